"""What is installed, what the machine has, and which fast ways are on; each is tried rather than looked up.

Nothing is downloaded. What is kept is what any use would keep: the native routines in the user's cache folder.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from packaging.requirements import Requirement
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, GPT2Config

from kronpress import native
from kronpress.benchmark.machine import Machine, available_bytes
from kronpress.benchmark.timing import Frozen
from kronpress.checkpoint import load_model, save_checkpoint
from kronpress.compression import compress_
from kronpress.dispatch import MEASURED_DTYPES, constants_path, measured_constants
from kronpress.errors import WorkError
from kronpress.layers import StructuredLinear
from kronpress.matrices import Kronecker
from kronpress.native import build
from kronpress.planning import make_plan
from kronpress.recipe import POCKET, load_recipe
from kronpress.tokens.cache import FOLDER_VARIABLE, cache_folder

DISTRIBUTION = "kronpress"
# Extras of who works on kronpress itself.
OF_DEVELOPERS = frozenset({"dev", "docs", "browser"})
# What is of use without being an extra, and what for.
USEFUL = {"torchao": "healing.optimizer=adamw-8bit", "triton": "torch.compile on a GPU"}
# Of relative size, in float32: what rounding in another order comes to.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Package(Frozen):
    """One package: `wanted` is the constraint, empty if any version will do; `extra` is None for what is needed."""

    name: str
    installed: str | None
    wanted: str
    extra: str | None
    purpose: str = ""

    @property
    def fits(self) -> bool:
        """Whether it is installed in a version that the constraint allows.

        >>> Package(name="torch", installed="2.4.1", wanted=">=2.6", extra=None).fits
        False
        """
        if self.installed is None:
            return False
        return Requirement(f"{self.name}{self.wanted}").specifier.contains(self.installed, prereleases=True)

    @property
    def problem(self) -> str | None:
        """One clause, or None. What is not installed is a problem only if it is needed."""
        if self.fits or (self.installed is None and self.extra is not None):
            return None
        given = "is not installed" if self.installed is None else f"{self.installed} is installed"
        wanted = f", {self.wanted} is needed" if self.wanted else ""
        return f"{self.name}: {given}{wanted}: pip install '{self.name}{self.wanted}'"


class Check(Frozen):
    """Something that everything else needs, tried: what came out, or the error that came."""

    name: str
    works: bool
    told: str


class FastPath(Frozen):
    """Something that makes work faster: what was seen if it is on, or why not and what would switch it on."""

    name: str
    is_on: bool
    told: str
    switch_on: str | None = None


class Diagnosis(Frozen):
    """All that was found; `thorough` says whether what takes long was tried as well."""

    kronpress: str
    python: str
    platform: str
    machine: Machine
    usable_cores: int
    memory_bytes: int | None
    available_bytes: int | None
    thorough: bool
    packages: list[Package]
    checks: list[Check]
    fast_paths: list[FastPath]

    @property
    def broken(self) -> list[str]:
        """What does not work and is needed, one clause each."""
        needed = [package for package in self.packages if package.extra is None]
        missing = [problem for package in needed if (problem := package.problem) is not None]
        return [*missing, *(f"{check.name}: {check.told}" for check in self.checks if not check.works)]


def diagnose(thorough: bool = False, progress: Callable[[str], None] = lambda _: None) -> Diagnosis:
    """Look at everything and try it; a second or two.

    Args:
        thorough: also compile a function with torch.compile, which takes some ten seconds.
    """
    progress("trying what everything needs")
    checks = [_check(name, attempt) for name, attempt in CHECKS.items()]
    progress("trying the fast paths")
    fast_paths = [*(_fast_path(name, attempt) for name, attempt in FAST_PATHS.items())]
    if thorough:
        progress("compiling a function")
    fast_paths.append(_fast_path("torch.compile", lambda: compiler_path(thorough)))
    return Diagnosis(
        kronpress=_installed(DISTRIBUTION) or "not installed",
        python=platform.python_version(),
        platform=platform.platform(),
        machine=Machine.here(),
        usable_cores=usable_cores(),
        memory_bytes=_memory_bytes(),
        available_bytes=available_bytes(),
        thorough=thorough,
        packages=packages(requirements()),
        checks=checks,
        fast_paths=fast_paths,
    )


# ---- what is installed ----


def requirements() -> list[str]:
    """What kronpress asks for: of a checkout what its pyproject.toml says now, else what was recorded on installing."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.is_file():
        return metadata.requires(DISTRIBUTION) or []
    content = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = content["optional-dependencies"]
    return [*content["dependencies"], *(f"{each}; extra == '{extra}'" for extra in extras for each in extras[extra])]


def packages(requirements: list[str]) -> list[Package]:
    """Those of `requirements`, the needed ones first, then those of extras and what is useful besides.

    Args:
        requirements: as `importlib.metadata.requires` gives them.

    >>> [package.name for package in packages(["torch>=2.6", "pytest; extra == 'dev'"]) if package.extra is None]
    ['torch']
    """
    needed: list[Package] = []
    optional: list[Package] = []
    for requirement in map(Requirement, requirements):
        marker, wanted = requirement.marker, str(requirement.specifier)
        extra = None if marker is None else _extra(requirement)
        if extra in OF_DEVELOPERS or (marker is not None and not marker.evaluate({"extra": extra or ""})):
            continue
        found = Package(name=requirement.name, installed=_installed(requirement.name), wanted=wanted, extra=extra)
        (needed if extra is None else optional).append(found)
    useful = [
        Package(name=name, installed=_installed(name), wanted="", extra="", purpose=purpose)
        for name, purpose in USEFUL.items()
    ]
    return [*needed, *optional, *useful]


def _extra(requirement: Requirement) -> str | None:
    """The name that the marker compares `extra` with; None if it does not."""
    words = str(requirement.marker).replace("'", '"').split()
    places = [place for place, word in enumerate(words) if word == "extra"]
    return words[places[0] + 2].strip('")') if places else None


def _installed(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


# ---- the machine ----


def usable_cores() -> int:
    """Cores that this process may use, where the system tells."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory_bytes() -> int | None:
    """Of the machine, or what its container is given."""
    limits = []
    with suppress(OSError, ValueError, AttributeError):  # a system that does not tell
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # another system, or no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)


# ---- what everything needs ----


def _check(name: str, attempt: Callable[[], str]) -> Check:
    try:
        return Check(name=name, works=True, told=attempt())
    except Exception as error:  # whatever a broken installation makes of it
        return Check(name=name, works=False, told=_reason(error))


def _reason(error: Exception) -> str:
    said = " ".join(str(error).split())
    return said if isinstance(error, WorkError) else f"{type(error).__name__}: {said}"


def _agree(ours: Tensor, reference: Tensor, what: str) -> None:
    """WorkError unless both are equal but for rounding."""
    error = ((ours.double() - reference.double()).norm() / reference.double().norm()).item()
    if not error <= TOLERANCE[ours.dtype]:  # nor NaN
        raise WorkError(f"{what}: wrong by {error:.1e} of the plain result")


def _device() -> torch.device:
    """The one that models are put on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _random(*shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def try_products() -> str:
    """The product by the factors of a Kronecker sum against that by its dense matrix.

    Raises:
        WorkError: they differ.
    """
    spec = Kronecker.Spec(left_shape=(16, 12), right_shape=(2, 4), num_terms=3)
    device = _device()
    for dtype in TOLERANCE:
        layer = StructuredLinear(Kronecker.from_dense(_random(32, 48), spec)).to(device, dtype)
        with torch.no_grad():
            for num_tokens in (1, 8):
                x = _random(num_tokens, 48, device=device, dtype=dtype)
                weight = Kronecker.expand({name: factor.double() for name, factor in layer.factors.items()})
                _agree(layer(x), x.double() @ weight.T, f"{num_tokens} tokens in {dtype} on {device}")
    return f"products by factors agree with the dense matrix on {device}"


def try_checkpoint() -> str:
    """A small model of random numbers, compressed, saved and loaded by transformers.

    Raises:
        WorkError: another model comes back.
    """
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    recipe = load_recipe({"targets": "mlp", "structure": "low_rank", "budget": {"kept_of_targets": 0.5}})
    compress_(model, make_plan(model, recipe))
    ids = torch.arange(8)[None]
    with tempfile.TemporaryDirectory(prefix="kronpress-doctor-") as folder, torch.no_grad():
        out = Path(folder) / "model"
        save_checkpoint(model, None, out)
        loaded = AutoModelForCausalLM.from_pretrained(out).eval()
        if not torch.equal(loaded(ids).logits, model(ids).logits):
            raise WorkError("a compressed model comes back from its checkpoint with other logits")
    return "a compressed model comes back from its checkpoint with the same logits"


def try_pocket() -> str:
    """The bundled model on the bundled tokenizer's tokens.

    Raises:
        WorkError: it cannot be loaded, or its logits are not finite.
    """
    loaded = load_model(POCKET)
    ids = torch.tensor([loaded.tokenizer("The old man sat by the window.")["input_ids"]], device=loaded.model.device)
    with torch.no_grad():
        if not loaded.model(ids).logits.isfinite().all():
            raise WorkError("its logits are not finite")
    return f"{sum(each.numel() for each in loaded.model.parameters()):,} parameters, loaded and run"


def try_native() -> str:
    """The native routines, if there are any, against the plain products.

    Raises:
        WorkError: a product is wrong.
    """
    if not native.is_available():
        return "none; plain products take their place"
    left, right, rows = _random(24, 2, 16), _random(2, 2, 4), _random(40, 64)
    for dtype in TOLERANCE:
        a, b, w, v = (each.to(dtype) for each in (left, right, rows, _random(64, 40)))
        for num_tokens in range(1, native.MOST_TOKENS + 1):
            x, z = _random(num_tokens, 64, dtype=dtype), _random(num_tokens, 40, dtype=dtype)
            dense = torch.einsum("pia,qib->pqab", a.double(), b.double()).reshape(48, 64)
            for what, ours, reference in (
                ("kronecker", native.kronecker(a, b, x), x.double() @ dense.T),
                ("linear", native.linear(w, x), x.double() @ w.double().T),
                ("low rank", native.low_rank(v, w, x), x.double() @ w.double().T @ v.double().T),
                ("linear", native.linear(v, z), z.double() @ v.double().T),
            ):
                _agree(ours, reference, f"native {what} of {num_tokens} tokens in {dtype}")
    return "agree with the plain products in float32 and bfloat16"


CHECKS: dict[str, Callable[[], str]] = {
    "products": try_products,
    "native routines": try_native,
    "checkpoints": try_checkpoint,
    "bundled model": try_pocket,
}


# ---- what makes it faster ----


def _fast_path(name: str, attempt: Callable[[], FastPath]) -> FastPath:
    try:
        return attempt().model_copy(update={"name": name})
    except Exception as error:  # as of `_check`: a doctor goes on
        return FastPath(name=name, is_on=False, told=_reason(error), switch_on="mend what the message names")


def on(told: str) -> FastPath:
    return FastPath(name="", is_on=True, told=told)


def off(told: str, switch_on: str) -> FastPath:
    return FastPath(name="", is_on=False, told=told, switch_on=switch_on)


def native_path() -> FastPath:
    if native.is_available():
        told = f"{native.instruction_set()} routines for up to {native.MOST_TOKENS} tokens on the CPU"
        compiler = " ".join(build.compiler())
        kept = build.cache_folder()
        where = f"kept in {str(kept)!r}" if build.is_private(kept) else "built anew for each process"
        return on(f"{told}, by {compiler}, {where}")
    return off(native.why_not() or "", _how_to_have_native())


def _how_to_have_native() -> str:
    if os.environ.get("KRONPRESS_NATIVE"):
        return "unset KRONPRESS_NATIVE"
    if sys.platform != "linux" or sys.byteorder != "little":
        return "nothing: they are written for little-endian Linux"
    try:
        build.compiler()
    except WorkError:
        return f"install a C compiler ({', '.join(build.COMPILERS)}), or name one in CC"
    return "another C compiler, named in CC, such as CC=clang"


def instructions_path() -> FastPath:
    """Whether torch and the native routines use the widest vectors that the processor has."""
    has, used = Machine.here().instructions, torch.backends.cpu.get_cpu_capability()
    widest = next((flag.upper() for flag in ("avx512f", "avx2", "sve", "asimd") if flag in has), None)
    if widest in ("AVX512F", "AVX2") and not used.startswith(widest[:6]):
        limit = os.environ.get("ATEN_CPU_CAPABILITY")
        how = "unset ATEN_CPU_CAPABILITY" if limit else "a build of torch for this processor"
        return off(f"the processor has {widest}, torch uses {used}", how)
    return on(f"torch uses {used}")


def bfloat16_path() -> FastPath:
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return on("the GPU computes in bfloat16")
        return off("the GPU has no arithmetic in bfloat16", "a GPU of compute capability 8.0 or newer")
    flags = [flag for flag in Machine.here().instructions if flag in ("avx512_bf16", "amx_bf16", "bf16")]
    if flags:
        return on(f"the processor has {', '.join(flags)}")
    return off("the processor tells of no arithmetic in bfloat16", "another processor; float32 is the faster one here")


def threads_path() -> FastPath:
    threads, cores = torch.get_num_threads(), usable_cores()
    if threads >= cores:
        return on(f"torch uses {threads} threads on {cores} cores")
    limits = [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)]
    if limits:
        return off(f"torch uses {threads} of {cores} cores: {limits[0]} is set", f"unset {limits[0]}")
    return off(f"torch uses {threads} of {cores} cores", f"OMP_NUM_THREADS={cores}; with hyperthreads it may not pay")


def onednn_path() -> FastPath:
    if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        return on("oneDNN: a dense weight that is kept is laid out as it likes to read it")
    return off("torch was built without oneDNN", "another build of torch")


def dispatch_path() -> FastPath:
    device = _device()
    known = measured_constants(device)
    missing = [
        str(each).removeprefix("torch.") for each in MEASURED_DTYPES if (device.type, each.itemsize) not in known
    ]
    if not missing:
        return on(f"the constants of this {device.type} are measured, in {str(constants_path())!r}")
    return off(
        f"{' and '.join(missing)} not measured for this {device.type}, torch and {torch.get_num_threads()} threads: "
        "a built-in table serves",
        "kp.set_dispatch(model, measure=True), or `kronpress bench` of a compressed model: a second, once",
    )


def attention_path() -> FastPath:
    """Whether scaled dot-product attention has a kernel that does not form the maps, and whether it is right."""
    device = _device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (_random(3, 1, 2, 16, 32, device=device, dtype=dtype)).unbind()
    reference = F.softmax((q.double() @ k.double().mT) / 32**0.5, dim=-1) @ v.double()
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), torch.no_grad():
            flash = F.scaled_dot_product_attention(q, k, v)
    except RuntimeError as error:
        return off(f"torch has no flash kernel here: {_reason(error)}", "another build of torch, or a newer GPU")
    _agree(flash, reference, "flash attention")
    return on(f"torch's flash kernel on {device}, through sdpa, which transformers takes by itself")


def cuda_path() -> FastPath:
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            return off(
                f"torch {torch.__version__} is built without CUDA", "a GPU, and the build of torch for it (pytorch.org)"
            )
        return off(
            f"torch is built for CUDA {torch.version.cuda}, and finds no GPU",
            "a GPU and its driver; in a container, one that is given the GPU; CUDA_VISIBLE_DEVICES not empty",
        )
    a, b = _random(64, 64), _random(64, 64)
    _agree((a.cuda().double() @ b.cuda().double()).float().cpu(), a.double() @ b.double(), "a product on the GPU")
    found = torch.cuda.get_device_properties(0)
    return on(
        f"{found.name}, {found.total_memory / 1e9:.1f} GB, compute capability {found.major}.{found.minor}, "
        f"CUDA {torch.version.cuda}; {torch.cuda.device_count()} in all"
    )


def triton_path() -> FastPath:
    installed = _installed("triton")
    if not torch.cuda.is_available():
        return off("there is no GPU that it could compile for", "a GPU; on a CPU nothing needs it")
    if installed is None:
        return off("triton is not installed", "pip install triton; torch's builds for CUDA bring it along")
    return on(f"triton {installed}")


def cache_path() -> FastPath:
    folder = cache_folder("tokens")
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return on(f"tokens and moments are kept in {str(folder.parent)!r}")
    return off(f"{str(existing)!r} cannot be written", f"{FOLDER_VARIABLE}=FOLDER, one that can be written")


def compiler_path(thorough: bool) -> FastPath:
    """torch.compile: what it needs is looked up, and with `thorough` it compiles a function that is then compared."""
    for why, how in _missing_for_compile():
        return off(why, how)
    if not thorough:
        return on("has what it needs; not tried: --thorough compiles. Used if asked for: bench --compile, kp.compile_")
    x, w = _random(8, 32, device=_device()), _random(32, 32, device=_device())

    def block(x: Tensor) -> Tensor:
        return F.gelu(x @ w.T) + x

    with torch.no_grad():
        _agree(torch.compile(block, fullgraph=True)(x), block(x.double().float()), "a compiled function")
    return on("a function compiles and gives the same. Used if asked for: bench --compile, kp.compile_")


def _missing_for_compile() -> Iterator[tuple[str, str]]:
    """Why it cannot work here, and what would help."""
    if torch.cuda.is_available():
        if _installed("triton") is None:
            yield "on a GPU it needs triton", "pip install triton"
        return
    compiler = os.environ.get("CXX", "g++" if sys.platform == "linux" else "clang++")
    if not shutil.which(compiler):
        yield f"there is no C++ compiler {compiler!r}", "install g++ or clang++; CXX names another"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        yield f"Python's headers are not in {str(headers)!r}", "the package python3-dev, or python3-devel"


FAST_PATHS: dict[str, Callable[[], FastPath]] = {
    "native routines": native_path,
    "vectors": instructions_path,
    "bfloat16": bfloat16_path,
    "threads": threads_path,
    "oneDNN": onednn_path,
    "dispatch": dispatch_path,
    "flash attention": attention_path,
    "CUDA": cuda_path,
    "triton": triton_path,
    "cache": cache_path,
}
