"use strict";
// All text is inserted with textContent: what is translated is never read as HTML.

const at = (id) => document.getElementById(id);
const AUTO = "auto";
const PAUSE = 700; // ms without typing, after which text is translated

let languages = [];
let place = ""; // where the chosen model answers: "models/NAME/", or "" for all models together
let limit = -1;
let running = null; // AbortController of the translation that is being received
let timer = 0;
let detected = "";

const nameOf = (code) => (languages.find((each) => each.code === code) || { name: code }).name;
const html = (code) => code.replaceAll("_", "-"); // as lang has it
const number = (value) => value.toLocaleString("en");

function bytes(count) {
  for (const [size, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (count >= size) return `${(count / size).toFixed(1)} ${name}`;
  }
  return `${count} bytes`;
}

function make(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

async function read(path) {
  const answer = await fetch(path);
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error || answer.statusText);
  return value;
}

function showError(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

function fill(select, codes, chosen) {
  select.replaceChildren();
  for (const code of codes) {
    const option = make("option", code === AUTO ? "Detect" : nameOf(code));
    option.value = code;
    select.append(option);
  }
  if (codes.includes(chosen)) select.value = chosen;
}

// The languages that there is a direction into, from the language that is chosen.
function targetsOf(source) {
  if (source === AUTO) {
    const into = new Set(languages.flatMap((each) => each.targets));
    return languages.map((each) => each.code).filter((code) => into.has(code));
  }
  const own = languages.find((each) => each.code === source);
  const order = languages.map((each) => each.code);
  return own ? [...own.targets].sort((a, b) => order.indexOf(a) - order.indexOf(b)) : [];
}

function chosen(target) {
  fill(at("target"), targetsOf(at("source").value), target || at("target").value);
  const source = at("source").value;
  const known = source === AUTO ? detected : source;
  at("swap").disabled = !known || !targetsOf(at("target").value).includes(known);
  at("translation").lang = html(at("target").value);
  if (source === AUTO) at("text").removeAttribute("lang");
  else at("text").lang = html(source);
}

function counted() {
  const length = [...at("text").value].length;
  const most = limit > 0 ? ` of ${number(limit)}` : "";
  at("count").textContent = length ? `${number(length)}${most} characters` : "";
}

function request() {
  const body = { q: at("text").value, source: at("source").value, target: at("target").value, stream: true };
  if (!at("key-field").hidden) body.api_key = at("key").value;
  return body;
}

// Yield the objects of an answer, one a line, as they come.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line) yield JSON.parse(line);
  }
}

async function translate() {
  clearTimeout(timer);
  if (running) running.abort();
  const own = (running = new AbortController());
  const asked = request();
  showError("");
  at("copy").hidden = true;
  at("time").textContent = "";
  at("detected").textContent = "";
  at("translation").replaceChildren();
  if (!asked.q.trim()) {
    at("translation").setAttribute("aria-busy", "false");
    return;
  }
  at("translation").setAttribute("aria-busy", "true");
  const began = performance.now();
  try {
    const answer = await fetch(`${place}translate`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(asked),
      signal: own.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error || answer.statusText);
    let source = asked.source;
    for await (const event of events(answer)) {
      if (own.signal.aborted) return;
      if (event.error) throw new Error(event.error);
      if (event.translatedText) at("translation").append(event.translatedText);
      if (event.detectedLanguage) {
        source = detected = event.detectedLanguage.language;
        at("detected").textContent = `Detected: ${nameOf(source)} (${event.detectedLanguage.confidence}\u00a0%)`;
      }
    }
    at("time").textContent = `${((performance.now() - began) / 1000).toFixed(2)} s`;
    at("translation").setAttribute("aria-busy", "false");
    at("copy").hidden = !navigator.clipboard;
    chosen(asked.target);
    if (source !== asked.target) await about(source, asked.target);
  } catch (error) {
    if (error.name !== "AbortError") {
      showError(error.message);
      at("about").hidden = true;
    }
  } finally {
    if (running === own) {
      running = null;
      at("translation").setAttribute("aria-busy", "false");
    }
  }
}

// Show what translated: the model, its size, and the experts of a sub-network.
async function about(source, target) {
  const found = await read(`${place}details?${new URLSearchParams({ source, target })}`);
  const facts = [
    ["Direction", `${nameOf(source)} to ${nameOf(target)}`],
    ["Model", found.model],
    ["Engine", found.engine === "ctranslate2" ? "CTranslate2" : "torch"],
  ];
  if (found.loaded) {
    facts.push(["Parameters loaded", number(found.parameters)], ["Memory", bytes(found.bytes)]);
    if (found.step) facts.push(["Step of training", number(found.step)]);
  }
  at("facts").replaceChildren(
    ...facts.map(([name, value]) => {
      const pair = make("div");
      pair.append(make("dt", name), make("dd", value));
      return pair;
    }),
  );
  const layers = found.experts || [];
  at("layers").replaceChildren(...layers.map(layer));
  at("experts").hidden = !layers.length;
  at("about").hidden = false;
}

function layer({ side, layer, of, experts }) {
  const item = make("li");
  const side_ = side[0].toUpperCase() + side.slice(1);
  item.append(make("strong", `${side_} layer ${layer}`));
  const used = experts.map((each) => `${each.expert} (${(100 * each.weight).toFixed(0)}\u00a0%)`);
  const word = used.length === 1 ? "expert" : "experts";
  item.append(make("span", `: ${word} ${used.join(", ")} of ${number(of)}`));
  const cells = make("div", undefined, "cells");
  cells.setAttribute("aria-hidden", "true");
  const weights = new Map(experts.map((each) => [each.expert, each.weight]));
  for (let index = 0; index < of; index++) {
    const cell = make("i", undefined, weights.has(index) ? "used" : "");
    cell.title = weights.has(index) ? `expert ${index}: weight ${weights.get(index)}` : `expert ${index}`;
    cells.append(cell);
  }
  item.append(cells);
  return item;
}

function swap() {
  const source = at("source").value === AUTO ? detected : at("source").value;
  const target = at("target").value;
  const text = at("translation").textContent;
  at("source").value = target;
  chosen(source);
  if (text) at("text").value = text;
  changed();
}

function changed() {
  counted();
  remember();
  translate();
}

// Keep the languages and the model, not the text, in the address.
function remember() {
  const kept = new URLSearchParams({ source: at("source").value, target: at("target").value });
  if (at("model").value) kept.set("model", at("model").value);
  history.replaceState(null, "", `#${kept}`);
}

// Read what the chosen model translates, and choose these languages where it has them.
async function chooseModel(source, target) {
  place = at("model").value ? `models/${encodeURIComponent(at("model").value)}/` : "";
  const [all, settings] = await Promise.all(["languages", "frontend/settings"].map((path) => read(place + path)));
  languages = all;
  limit = settings.charLimit;
  detected = "";
  at("key-field").hidden = !settings.keyRequired;
  const sources = languages.filter((each) => each.targets.length).map((each) => each.code);
  fill(at("source"), settings.detection ? [AUTO, ...sources] : sources, settings.language.source.code);
  if ([...at("source").options].some((each) => each.value === source)) at("source").value = source;
  chosen(target || settings.language.target.code);
}

// Offer the models, if there are several; "" stands for all of them together.
function fillModels(models, wanted) {
  at("model").append(make("option", "The first that has the direction"));
  at("model").lastChild.value = "";
  for (const each of models) at("model").append(make("option", each.name));
  if (models.some((each) => each.name === wanted)) at("model").value = wanted;
  at("model-field").hidden = models.length < 2;
}

async function start() {
  const asked = new URLSearchParams(location.hash.slice(1));
  try {
    const models = await read("models");
    fillModels(models, asked.get("model"));
    await chooseModel(asked.get("source"), asked.get("target"));
    const directions = new Set(models.flatMap((each) => each.directions)).size;
    const codes = new Set(models.flatMap((each) => each.directions.flatMap((one) => one.split("-")))).size;
    const names = models.map((each) => each.name).join(", ");
    at("served").textContent =
      `${names} · ${codes} languages, ${directions} direction${directions === 1 ? "" : "s"}`;
  } catch (error) {
    showError(`The server does not answer: ${error.message}`);
    return;
  }
  at("model").addEventListener("change", async () => {
    try {
      await chooseModel(at("source").value, at("target").value);
      changed();
    } catch (error) {
      showError(`The server does not answer: ${error.message}`);
    }
  });
  at("source").addEventListener("change", () => { detected = ""; chosen(); changed(); });
  at("target").addEventListener("change", () => { chosen(); changed(); });
  at("swap").addEventListener("click", swap);
  at("text").addEventListener("input", () => {
    counted();
    clearTimeout(timer);
    timer = setTimeout(translate, PAUSE);
  });
  at("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) translate();
  });
  at("form").addEventListener("submit", (event) => { event.preventDefault(); translate(); });
  at("copy").addEventListener("click", async () => {
    await navigator.clipboard.writeText(at("translation").textContent);
    at("copy").textContent = "Copied";
    setTimeout(() => { at("copy").textContent = "Copy"; }, 1500);
  });
  if (asked.get("q")) {
    at("text").value = asked.get("q");
    changed();
  }
}

start();
