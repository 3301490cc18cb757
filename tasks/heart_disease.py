"""Heart disease in four hospitals (UCI, 920 patients): a preset of the tabular task, with its data in the package.

Each hospital recorded other things: Switzerland no cholesterol (0 means missing), Hungary next to no thallium scans.
The features are the ten columns that most hospitals have, in round ranges that cover most adult patients: constants
of this file, since a range computed from the patients would tell of them.
"""

from __future__ import annotations

from pathlib import Path

from .tabular import Tabular
from .task import SiteData

PACKAGED = Path(__file__).parent / "data" / "heart_disease.csv"

FEATURES: dict[str, dict[str, object]] = {
    "age": {"range": [20, 80]},
    "sex": {"flag": "Male"},
    "cp": {"values": ["typical angina", "atypical angina", "non-anginal", "asymptomatic"]},
    "trestbps": {"range": [90, 180], "missing_values": [0]},
    "chol": {"range": [100, 400], "missing": True, "missing_values": [0]},
    "fbs": {"flag": True, "missing": True},
    "restecg": {"flag": ["lv hypertrophy", "st-t abnormality"]},
    "thalch": {"range": [60, 200], "missing": True},
    "exang": {"flag": True},
    "oldpeak": {"range": [-2, 5], "missing": True},
}


class HeartDisease(Tabular):
    """Is there heart disease (`num` above 0)? 17 inputs; logistic regression has 18 parameters."""

    def __init__(self, *, fold: int = 0, folds: int = 5, model: str = "logistic") -> None:
        super().__init__(
            target="num",
            classes={"no disease": [0], "disease": [1, 2, 3, 4]},
            features=FEATURES,
            client_column="dataset",
            id_column="id",
            fold=fold,
            folds=folds,
            model=model,
        )

    def partitions(self, source: Path | None) -> dict[str, SiteData]:
        """Return the four hospitals of the packaged table, or of `source` where it is given."""
        return super().partitions(source or PACKAGED)
