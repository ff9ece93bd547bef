"""How fast models prefill and decode, taking turns in one process, and how much memory each takes in its own."""

from kronpress.benchmark.contenders import DTYPES, Contender
from kronpress.benchmark.machine import Machine
from kronpress.benchmark.memory import Memory, memory_alone
from kronpress.benchmark.rivals import RIVALS
from kronpress.benchmark.run import (
    DEFAULT_NEW_TOKENS,
    Benchmark,
    Comparison,
    Measured,
    ModelBenchmark,
    Ways,
    benchmark,
    checked_prompt_tokens,
)
from kronpress.benchmark.sizes import Sizes
from kronpress.benchmark.timing import (
    DEFAULT_ROUNDS,
    WARM_UP_ROUNDS,
    Speedup,
    Spread,
    Timing,
    Work,
    time_rounds,
    token_ids,
)

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "DEFAULT_ROUNDS",
    "DTYPES",
    "RIVALS",
    "WARM_UP_ROUNDS",
    "Benchmark",
    "Comparison",
    "Contender",
    "Machine",
    "Measured",
    "Memory",
    "ModelBenchmark",
    "Sizes",
    "Speedup",
    "Spread",
    "Timing",
    "Ways",
    "Work",
    "benchmark",
    "checked_prompt_tokens",
    "memory_alone",
    "time_rounds",
    "token_ids",
]
