"""The experiments that come with bract."""

from __future__ import annotations

from pathlib import Path

DEFAULT_EXPERIMENT = Path(__file__).parent / "heart_disease.toml"
