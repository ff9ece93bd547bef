"""What `pocket` is worth: its loss beside the 5-gram model's, how low its rank is, and how it writes.

    python benchmarks/pocket_quality.py > benchmarks/results/pocket_quality.json

The rise in loss of plain truncated SVD at half of the MLPs' parameters says whether the model is so briefly trained
that it is nearly low rank; it is taken on the validation books.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import kronpress as kp
from kronpress.pipeline import continue_text

PROMPTS = (
    "It was a cold evening in November, and the old man",
    "The king rose from his seat and said,",
    '"I do not believe a word of it," she answered,',
)


def main() -> None:
    loaded = kp.load_model("pocket")
    texts = {split: kp.load_running_text("bundled", split).text for split in ("validation", "test")}

    def measured(model: Any, split: str) -> dict[str, Any]:
        return kp.evaluate(model, loaded.tokenizer, texts[split]).to_json()

    halved = copy.deepcopy(loaded.model)
    kp.compress_(halved, kp.make_plan(halved, kp.load_recipe("low-rank", ["budget.kept_of_targets=0.5"], "pocket")))
    dense = {split: measured(loaded.model, split) for split in texts}
    half = measured(halved, "validation")
    results = {
        "command": "python benchmarks/pocket_quality.py",
        "num_params": sum(p.numel() for p in loaded.model.parameters()),
        "dense": dense,
        "half_of_mlp_by_svd": half,
        "svd_rise_nats": half["nll_mean_nats"] - dense["validation"]["nll_mean_nats"],
        "continuations": [continue_text(loaded.model, loaded.tokenizer, prompt) for prompt in PROMPTS],
    }
    print(json.dumps(results, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
