"""Hold what several test modules share: builders of small things, references to compare with, and layouts."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
