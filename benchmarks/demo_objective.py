"""Which objective the demo should heal by: language-model loss or distillation, from the same compressed start.

    python benchmarks/demo_objective.py > benchmarks/results/demo_objective.json

Measured on the bundled validation books; the test books are not read.
"""

from __future__ import annotations

import copy
import json

import kronpress as kp

STEPS = 60


def main() -> None:
    teacher = kp.load_model("pocket")
    recipe = kp.load_recipe("krony-96m", [f"healing.max_steps={STEPS}"], "pocket")
    tokens = kp.load_train_tokens(teacher.tokenizer, recipe.healing.data, 10**9)
    text = kp.load_running_text("bundled", "validation").text
    start = copy.deepcopy(teacher.model)
    kp.compress_(start, kp.make_plan(start, recipe))

    def nats(model: object) -> float:
        return kp.evaluate(model, teacher.tokenizer, text).nll_mean_nats  # type: ignore[arg-type]

    results = {"steps": STEPS, "recipe": recipe.name, "dense_nats": nats(teacher.model), "start_nats": nats(start)}
    for name, language_model, distillation in [("language_model", 1.0, 0.0), ("distillation", 0.0, 1.0)]:
        student = copy.deepcopy(start)
        weights = {"language_model_weight": language_model, "distillation_weight": distillation}
        healing = recipe.healing.model_copy(update=weights)
        kp.heal_(student, teacher.model, tokens, healing, seed=recipe.seed)
        results[f"{name}_nats"] = nats(student)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
