"""The native routines against float64: every instruction set, shape, dtype and view; and every way not to have them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kronpress import native
from kronpress.errors import RequestError, WorkError
from kronpress.matrices import STRUCTURES
from kronpress.native import build

EVERY_FIXTURE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = (torch.float32, torch.bfloat16)
# float32: a sum of products errs by this much of the sum of their sizes. bfloat16: the result alone is rounded.
SUM_ERROR = 2e-6
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}

try:
    build.compiler()
    compiler_missing = ""
except WorkError as error:
    compiler_missing = str(error)
needs_compiler = pytest.mark.skipif(bool(compiler_missing), reason=compiler_missing)


@pytest.fixture(autouse=True)
def _loaded_anew() -> Iterator[None]:
    """What a test sets in the environment counts in that test only."""
    native.loaded.cache_clear()
    yield
    native.loaded.cache_clear()


@pytest.fixture(params=build.FLAGS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if compiler_missing:
        pytest.skip(compiler_missing)
    if request.param not in build.instruction_sets():
        pytest.skip(f"this machine does not have {request.param}")
    monkeypatch.setenv("KRONPRESS_NATIVE", request.param)
    assert native.why_not() is None
    assert native.instruction_set() == request.param
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(left: Tensor, right: Tensor) -> Tensor:
    """Σ_i A_i ⊗ B_i from its definition, (m1 m2, n1 n2)."""
    (m1, _, n1), (m2, _, n2) = left.shape, right.shape
    return torch.einsum("pia,qib->pqab", left, right).reshape(m1 * m2, n1 * n2)


def assert_near(
    y: Tensor, weights: Callable[[Callable[[Tensor], Tensor]], Tensor], x: Tensor, bias: Tensor | None
) -> None:
    """y = W x + bias in float64, within SUM_ERROR of |W| |x| + |bias| and one rounding; `weights(f)` is W after f."""
    wide = x.double()
    expected = wide @ weights(Tensor.double).mT
    size = wide.abs() @ weights(lambda w: w.double().abs()).mT
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    allowed = SUM_ERROR * size + ROUNDING[y.dtype] * expected.abs() + 1e-30
    excess = ((y.double() - expected).abs() / allowed).max().item() if y.numel() else 0.0
    assert excess <= 1, f"error is {excess} of what is allowed"


sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 129]))
small_sizes = st.sampled_from([1, 1, 2, 2, 3, 4, 5, 7, 24])


@EVERY_FIXTURE
@given(data=st.data(), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_kronecker_is_its_definition(instruction_set: str, data: st.DataObject, seed: int, dtype: torch.dtype) -> None:
    m1, n1, m2, n2 = (data.draw(strategy) for strategy in (sizes, sizes, small_sizes, small_sizes))
    if data.draw(st.booleans()):
        m1, n1, m2, n2 = m2, n2, m1, n1
    k, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    left, right = normal(seed, dtype, m1, k, n1), normal(seed + 1, dtype, m2, k, n2)
    x = normal(seed + 2, dtype, tokens, n1 * n2)
    bias = normal(seed + 3, dtype, m1 * m2) if data.draw(st.booleans()) else None
    y = native.kronecker(left, right, x, bias)
    assert y.shape == (tokens, m1 * m2)
    assert y.dtype == dtype
    assert_near(y, lambda to: dense(to(left), to(right)), x, bias)


@EVERY_FIXTURE
@given(data=st.data(), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_the_order_of_the_factors_is_but_an_order_of_inputs_and_outputs(
    instruction_set: str, data: st.DataObject, seed: int, dtype: torch.dtype
) -> None:
    """B ⊗ A is A ⊗ B between two perfect shuffles, and gives the same bit for bit."""
    m1, n1, m2, n2 = (data.draw(strategy) for strategy in (sizes, sizes, small_sizes, small_sizes))
    k, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    left, right = normal(seed, dtype, m1, k, n1), normal(seed + 1, dtype, m2, k, n2)
    x, bias = normal(seed + 2, dtype, tokens, n1, n2), normal(seed + 3, dtype, m1, m2)
    bias = bias if data.draw(st.booleans()) else None
    y = native.kronecker(left, right, x.flatten(1), None if bias is None else bias.flatten())
    shuffled = native.kronecker(right, left, x.mT.flatten(1), None if bias is None else bias.mT.flatten())
    if left.numel() != right.numel():  # else each takes its own left for the large one
        torch.testing.assert_close(shuffled.view(tokens, m2, m1).mT.flatten(1), y, rtol=0, atol=0)


@EVERY_FIXTURE
@given(
    m=sizes,
    n=sizes,
    tokens=st.integers(1, 6),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
)
def test_linear_is_its_definition(
    instruction_set: str, m: int, n: int, tokens: int, seed: int, dtype: torch.dtype, biased: bool
) -> None:
    weight, x = normal(seed, dtype, m, n), normal(seed + 1, dtype, tokens, n)
    bias = normal(seed + 2, dtype, m) if biased else None
    assert_near(native.linear(weight, x, bias), lambda to: to(weight), x, bias)


@EVERY_FIXTURE
@given(m=sizes, rank=sizes, n=sizes, tokens=st.integers(1, 5), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_low_rank_is_its_definition(
    instruction_set: str, m: int, rank: int, n: int, tokens: int, seed: int, dtype: torch.dtype
) -> None:
    left, right = normal(seed, dtype, m, rank, 1), normal(seed + 1, dtype, rank, n)
    x, bias = normal(seed + 2, dtype, tokens, n), normal(seed + 3, dtype, m)
    assert_near(native.low_rank(left, right, x, bias), lambda to: to(left).squeeze(-1) @ to(right), x, bias)


@EVERY_FIXTURE
@given(seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES), swap=st.booleans(), left_is_small=st.booleans())
def test_what_torch_computes_is_not_nearer_to_the_truth(
    instruction_set: str, seed: int, dtype: torch.dtype, swap: bool, left_is_small: bool
) -> None:
    """On the sizes of a real layer: the root mean square error is at most that of torch's own, but for chance."""
    (m1, n1), (m2, n2) = (96, 160), (1, 2) if swap else (4, 1)
    if left_is_small:
        m1, n1, m2, n2 = m2, n2, m1, n1
    left, right, x = (
        normal(seed, dtype, m1, 1, n1),
        normal(seed + 1, dtype, m2, 1, n2),
        normal(seed + 2, dtype, 2, n1 * n2),
    )
    expected = x.double() @ dense(left.double(), right.double()).mT
    factors = {"weight": left, "right": right}
    rival = STRUCTURES["kronecker"].multiply(factors, x)
    error, rival_error = (
        (y.double() - expected).square().mean().sqrt() for y in (native.kronecker(left, right, x), rival)
    )
    assert error <= 1.1 * rival_error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_is_small", [False, True])
def test_views_are_what_they_show(instruction_set: str, dtype: torch.dtype, left_is_small: bool) -> None:
    """x in any layout, and weights that start anywhere in memory."""
    left, right, bias = (normal(i, dtype, 1 + size)[1:] for i, size in enumerate((7 * 2 * 35, 3 * 2 * 2, 21)))
    left, right = left.view(7, 2, 35), right.view(3, 2, 2)
    if left_is_small:
        left, right = right, left
    for x in (
        normal(4, dtype, 70, 3).mT,
        normal(5, dtype, 3, 140)[:, ::2],
        normal(6, dtype, 1, 1, 70).expand(2, 1, 70),
        normal(7, dtype, 71)[1:],
        normal(8, dtype, 2, 1, 70),
    ):
        y = native.kronecker(left, right, x, bias)
        assert y.shape == (*x.shape[:-1], 21)
        assert_near(y, lambda to: dense(to(left), to(right)), x, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left_is_small", [False, True])
def test_a_result_depends_on_neither_the_threads_nor_the_other_tokens(
    instruction_set: str, threads: Callable[[int], None], dtype: torch.dtype, left_is_small: bool
) -> None:
    """Bit for bit, with a matrix large enough to be shared among threads."""
    left, right, x = normal(0, dtype, 517, 2, 130), normal(1, dtype, 3, 2, 2), normal(2, dtype, 4, 260)
    if left_is_small:
        left, right = right, left
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(native.kronecker(left, right, x))
        results.append(torch.cat([native.kronecker(left, right, row) for row in x.split(1)]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@needs_compiler
def test_many_python_threads_at_once(threads: Callable[[int], None]) -> None:
    threads(2)
    left, right = normal(0, torch.float32, 600, 1, 200), normal(1, torch.float32, 2, 1, 2)
    inputs = [normal(seed, torch.float32, 1, 400) for seed in range(40)]
    expected = [native.kronecker(left, right, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for y, alone in zip(pool.map(lambda x: native.kronecker(left, right, x), inputs), expected, strict=True):
            torch.testing.assert_close(y, alone, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e-40])
def test_special_numbers_come_through(instruction_set: str, value: float) -> None:
    """Also in bfloat16, whose rounding must not make a number of a NaN; padding must not make a NaN of infinity."""
    for dtype in DTYPES:
        weight, x = torch.zeros(5, 37, dtype=dtype), torch.ones(1, 37, dtype=dtype)
        weight[3, 36] = value
        expected = weight.sum(1)[None]
        torch.testing.assert_close(native.linear(weight, x), expected, rtol=0, atol=0, equal_nan=True)


@EVERY_FIXTURE
@given(seed=st.integers(0, 1000))
def test_bfloat16_is_rounded_as_torch_rounds(instruction_set: str, seed: int) -> None:
    """To nearest, ties to even: sums of two numbers, many of them half way between two of bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-600, 600, (64, 2), generator=generator).to(torch.bfloat16)
    exact = weight.float().sum(1)
    y = native.linear(weight, torch.ones(1, 2, dtype=torch.bfloat16))
    torch.testing.assert_close(y[0], exact.to(torch.bfloat16), rtol=0, atol=0)


@needs_compiler
def test_takes_what_it_says() -> None:
    left, right, bias = torch.ones(4, 1, 3), torch.ones(2, 1, 2), torch.ones(8)
    x = torch.ones(2, 2, 6)
    assert native.takes(x, left, right, bias)
    assert native.takes(x, nn.Parameter(left), nn.Parameter(right))
    assert native.takes(x.bfloat16(), left.bfloat16(), right.bfloat16())
    assert not native.takes(torch.ones(5, 6), left, right)
    assert not native.takes(torch.ones(0, 6), left, right)
    assert not native.takes(torch.tensor(1.0), left, right)
    assert not native.takes(x.double(), left.double(), right.double())
    assert not native.takes(x.half(), left.half(), right.half())
    assert not native.takes(x, left.bfloat16(), right)
    assert not native.takes(x, torch.ones(3, 4).mT, right)
    assert not native.takes(x.to("meta"), left.to("meta"), right.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not native.takes(x, left, right)
    seen = []
    torch.func.vmap(lambda one: seen.append(native.takes(one, left)) or one)(x)
    assert seen == [False]


@needs_compiler
def test_a_layer_takes_it_for_a_small_factor_on_either_side() -> None:
    """One token with a large A always; as many vectors as do not outweigh the reading otherwise."""
    large, small, medium = torch.ones(64, 1, 48), torch.ones(2, 1, 2), torch.ones(20, 1, 20)
    kronecker = STRUCTURES["kronecker"]

    def taken(left: Tensor, right: Tensor, tokens: int) -> bool:
        x = torch.ones(tokens, left.shape[2] * right.shape[2])
        return kronecker.takes_native({"weight": left, "right": right}, x)

    for tokens in (1, 2, 3, 4):
        assert taken(large, small, tokens)
        assert taken(small, large, tokens)
    assert not taken(large, small, 5)
    assert not taken(small, large, 5)
    assert taken(large, medium, 1)
    assert not taken(medium, large, 1)
    assert not taken(large, medium, 2)


@needs_compiler
def test_a_tracer_never_sees_native_routines() -> None:
    """A function that asks `takes` first compiles to one graph, and exports."""
    weight = normal(0, torch.float32, 8, 6)

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return native.linear(weight, x) if native.takes(x, weight) else x @ weight.mT

    x = normal(1, torch.float32, 2, 6)
    expected = Layer()(x)
    torch.testing.assert_close(torch.compile(Layer(), backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(Layer(), (x,)).module()(x), expected)


@needs_compiler
@pytest.mark.parametrize(
    "call",
    [
        lambda x, left, right, bias: native.kronecker(left, right, x[..., :5], bias),
        lambda x, left, right, bias: native.kronecker(left, right, x, bias[:7]),
        lambda x, left, right, bias: native.kronecker(left, right.double(), x, bias),
        lambda x, left, right, bias: native.kronecker(left.transpose(0, 1), right, x, bias),
        lambda x, left, right, bias: native.kronecker(left.expand(4, 2, 3), right.expand(2, 2, 2), x, bias),
        lambda x, left, right, bias: native.kronecker(left.expand(4, 2, 3), right, x, bias),
        lambda x, left, right, bias: native.kronecker(left.half(), right.half(), x.half(), bias.half()),
        lambda x, left, right, bias: native.kronecker(left, right, x, torch.ones(1).expand(8)),
        lambda x, left, right, bias: native.linear(torch.ones(8, 7), x, bias),
        lambda x, left, right, bias: native.linear(torch.ones(8, 6, device="meta"), x, bias),
        lambda x, left, right, bias: native.low_rank(torch.ones(8, 2), torch.ones(3, 6), x, bias),
    ],
)
def test_what_would_read_beyond_a_tensor_is_refused(call: Callable[..., Tensor]) -> None:
    with pytest.raises(RequestError):
        call(torch.ones(2, 6), torch.ones(4, 1, 3), torch.ones(2, 1, 2), torch.ones(8))


@pytest.mark.parametrize("value", ["0", "off", "avx1024"])
def test_turned_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("KRONPRESS_NATIVE", value)
    assert not native.is_available()
    assert value in str(native.why_not())
    assert not native.takes(torch.ones(1, 3), torch.ones(2, 3))
    with pytest.raises(WorkError, match=value):
        native.linear(torch.ones(2, 3), torch.ones(1, 3))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("KRONPRESS_NATIVE", raising=False)
    assert not native.is_available()
    assert "no C compiler" in str(native.why_not())
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    native.loaded.cache_clear()
    assert "no-such-compiler" in str(native.why_not())


@needs_compiler
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "broken.c"
    broken.write_text("#error this is not for you\n")
    monkeypatch.setattr(build, "SOURCE", broken)
    assert not native.is_available()
    assert "this is not for you" in str(native.why_not())


@needs_compiler
def test_wrong_results_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wrong = tmp_path / "wrong.c"
    wrong.write_text(
        "int linear(void) { return 0; }\nint kronecker(void) { return 0; }\nint low_rank(void) { return 0; }\n"
    )
    monkeypatch.setattr(build, "SOURCE", wrong)
    assert not native.is_available()
    assert "wrong results" in str(native.why_not())


def kept(cache: Path) -> list[Path]:
    """All that is in the cache, complete or not."""
    return list((cache / "kronpress" / "native").iterdir())


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_library_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.is_available()
    (library,) = kept(tmp_path)
    sound = library.read_bytes()
    middle = len(sound) // 2
    library.unlink()  # this process has it mapped: to cut that file short would kill it
    library.write_bytes(
        {
            "cut": sound[:middle],
            "flipped": sound[:middle] + bytes([sound[middle] ^ 1]) + sound[middle + 1 :],
            "empty": b"",
        }[damage]
    )
    build.load(native.instruction_set())
    assert kept(tmp_path) == [library]
    assert library.read_bytes() == sound


@needs_compiler
def test_a_kept_library_is_not_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.is_available()
    (library,) = kept(tmp_path)
    written = library.stat().st_mtime_ns
    native.loaded.cache_clear()
    assert native.is_available()
    assert kept(tmp_path) == [library]
    assert library.stat().st_mtime_ns == written


@needs_compiler
@pytest.mark.parametrize("obstacle", ["file", "open to all"])
def test_a_cache_that_cannot_be_trusted_or_written_is_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, obstacle: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "kronpress" / "native"
    if obstacle == "file":
        folder.parent.write_text("not a folder")
    else:
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    assert native.is_available()
    assert folder.parent.is_file() or kept(tmp_path) == []


@needs_compiler
def test_two_processes_that_build_at_once(tmp_path: Path) -> None:
    code = "from kronpress import native; print(native.why_not())"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "KRONPRESS_NATIVE": ""}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=300)[0].strip() for process in both] == ["None", "None"]
    assert len(kept(tmp_path)) == 1


POOL = """
import os, pathlib, torch
from kronpress import native

def threads_and_runtimes():
    mapped = {line.split()[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines()}
    return len(os.listdir("/proc/self/task")), sorted(name for name in mapped if "omp" in pathlib.Path(name).name)

torch.set_num_threads(3)
weight, x = torch.randn(2000, 2000), torch.randn(1, 2000)
assert native.is_available(), native.why_not()
(weight + weight).sum()
before = threads_and_runtimes()
for _ in range(5):
    native.linear(weight, x)
assert native.loaded().library.has_threads() == 1
print(before == threads_and_runtimes() or (before, threads_and_runtimes()))
"""


@needs_compiler
@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="this torch has no OpenMP")
def test_there_is_one_pool_of_threads() -> None:
    """After torch has its three threads, sharing native work among three starts no other and loads no other runtime."""
    environment = {**os.environ, "KRONPRESS_NATIVE": "", "OMP_NUM_THREADS": ""}
    run = subprocess.run([sys.executable, "-c", POOL], env=environment, capture_output=True, text=True, timeout=300)
    assert (run.stdout.strip(), run.returncode) == ("True", 0), run.stderr
