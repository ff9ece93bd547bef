"""The doctor tries what it tells of: what is broken is found, and each fast path that is off says what would help."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronpress import doctor, native
from kronpress.errors import WorkError
from kronpress.matrices import Kronecker
from kronpress.native import build

ROOT = Path(__file__).parents[1]


def test_what_is_needed_here_works_and_what_is_off_says_what_helps():
    found = doctor.diagnose()
    assert found.broken == []
    assert [check.name for check in found.checks] == list(doctor.CHECKS)
    assert [path.name for path in found.fast_paths] == [*doctor.FAST_PATHS, "torch.compile"]
    for path in found.fast_paths:
        assert path.told
        assert path.is_on == (path.switch_on is None)
    assert doctor.Diagnosis.model_validate_json(found.model_dump_json()) == found


def test_every_package_of_the_project_is_looked_at():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = doctor.packages(doctor.requirements())
    assert len([package for package in found if package.extra is None]) == len(project["dependencies"])
    extras = {package.extra for package in found if package.extra}
    assert extras == set(project["optional-dependencies"]) - doctor.OF_DEVELOPERS


@settings(deadline=None)
@given(st.tuples(*[st.integers(0, 30)] * 3), st.tuples(*[st.integers(0, 30)] * 3))
def test_a_version_fits_as_its_numbers_say(installed, least):
    given_version, wanted = (".".join(map(str, version)) for version in (installed, least))
    package = doctor.Package(name="torch", installed=given_version, wanted=f">={wanted}", extra=None)
    assert package.fits == (installed >= least)
    assert (package.problem is None) == package.fits


def test_packages_that_are_missing_are_broken_only_if_they_are_needed():
    needed, extra = doctor.packages(["no-such-package>=1", "no-other-package; extra == 'eval'"])[:2]
    assert (needed.extra, extra.extra) == (None, "eval")
    assert "no-such-package" in (needed.problem or "")
    assert "pip install 'no-such-package>=1'" in (needed.problem or "")
    assert extra.problem is None


def test_requirements_of_other_systems_are_left_out():
    assert [each.name for each in doctor.packages(["a; sys_platform == 'nowhere'", "b"])][:1] == ["b"]


def test_wrong_products_are_found(monkeypatch):
    multiply = Kronecker.multiply
    monkeypatch.setattr(Kronecker, "multiply", staticmethod(lambda *given: 1.001 * multiply(*given)))
    with pytest.raises(WorkError, match=r"8 tokens in torch\.float32"):
        doctor.try_products()


@pytest.mark.skipif(not native.is_available(), reason="no native routines here")
@pytest.mark.parametrize("routine", ["kronecker", "linear", "low_rank"])
def test_wrong_native_products_are_found(monkeypatch, routine):
    right = getattr(native, routine)
    monkeypatch.setattr(native, routine, lambda *given: 1.001 * right(*given))
    with pytest.raises(WorkError, match=routine.replace("_", " ")):
        doctor.try_native()


def test_a_model_without_finite_logits_is_found(monkeypatch):
    load = doctor.load_model

    def spoilt(name):
        loaded = load(name)
        with torch.no_grad():
            next(loaded.model.parameters()).fill_(torch.nan)
        return loaded

    monkeypatch.setattr(doctor, "load_model", spoilt)
    with pytest.raises(WorkError, match="not finite"):
        doctor.try_pocket()


def test_a_failed_attempt_is_told_and_the_doctor_goes_on(monkeypatch):
    def fail():
        raise OSError("no space")

    monkeypatch.setattr(doctor, "CHECKS", {"one": fail, "two": lambda: "well"})
    monkeypatch.setattr(doctor, "FAST_PATHS", {"fast": fail})
    found = doctor.diagnose()
    assert [check.works for check in found.checks] == [False, True]
    assert found.broken == ["one: OSError: no space"]
    assert found.fast_paths[0].told == "OSError: no space"


@pytest.fixture
def without_native(monkeypatch):
    """Whether there are native routines is found out anew, here and afterwards."""
    native.loaded.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native.loaded.cache_clear()


def test_native_routines_that_are_turned_off_say_so(without_native):
    without_native.setenv("KRONPRESS_NATIVE", "0")
    path = doctor.native_path()
    assert not path.is_on
    assert "KRONPRESS_NATIVE" in path.told
    assert path.switch_on == "unset KRONPRESS_NATIVE"
    assert "plain products" in doctor.try_native()


def test_a_machine_without_compilers_is_told_which_to_install(without_native, tmp_path):
    for name in ("CC", "CXX", "KRONPRESS_NATIVE"):
        without_native.delenv(name, raising=False)
    without_native.setenv("PATH", str(tmp_path))
    path = doctor.native_path()
    assert not path.is_on
    assert all(name in (path.switch_on or "") for name in build.COMPILERS)
    if not torch.cuda.is_available():
        assert "C++ compiler" in doctor.compiler_path(thorough=False).told


def test_fewer_threads_than_cores_are_told_with_what_limits_them(monkeypatch):
    monkeypatch.setattr(doctor, "usable_cores", lambda: torch.get_num_threads() + 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.threads_path().switch_on == "unset OMP_NUM_THREADS"
    monkeypatch.setattr(doctor, "usable_cores", torch.get_num_threads)
    assert doctor.threads_path().is_on


def test_constants_that_were_not_measured_are_told(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = doctor.dispatch_path()
    assert not path.is_on
    assert "float32 and bfloat16" in path.told
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(doctor.FOLDER_VARIABLE, str(tmp_path / "file"))
    assert doctor.FOLDER_VARIABLE in (doctor.cache_path().switch_on or "")
    monkeypatch.setenv(doctor.FOLDER_VARIABLE, str(tmp_path / "folder"))
    assert doctor.cache_path().is_on
