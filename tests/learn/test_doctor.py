"""The doctor: every FAIL is seen and says what to do."""

import json
import shutil
import sys

import pytest
from typer.testing import CliRunner

from minillm.cli import app
from minillm.learn import doctor


@pytest.fixture
def patient(monkeypatch, smollm_path):
    """A machine on which all is well, whatever this one is like."""
    monkeypatch.setattr(doctor, "MIN_DISK_GB", 0.0)
    monkeypatch.setattr(doctor, "MIN_MEMORY_GB", 0.0)
    return monkeypatch


def test_all_is_well_here(patient):
    findings = doctor.examine()
    assert [f for f in findings if f.status == "FAIL"] == []
    names = [f.name for f in findings]
    assert names[0] == "Python"
    assert names[-6:] == ["device", "Triton", "model", "disk", "memory", "Jupyter kernel"]
    assert "torch" in names


def test_json_and_exit_status(patient):
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    assert {"status", "name", "detail", "remedy"} == set(json.loads(result.stdout)[0])
    patient.setenv("MINILLM_CACHE", "/nonexistent")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def _finding(name):
    return next(f for f in doctor.examine() if f.name == name)


def test_missing_model(patient, tmp_path):
    patient.setenv("MINILLM_CACHE", str(tmp_path))
    assert _finding("model").status == "FAIL"
    assert "minillm fetch" in _finding("model").remedy


def test_without_pip(patient, tmp_path):
    patient.setenv("MINILLM_CACHE", str(tmp_path))
    patient.setattr("minillm.fetch.has_pip", lambda: False)
    assert "pip is missing in this environment" in _finding("model").remedy
    assert "ensurepip" in _finding("model").remedy


def test_a_disk_that_is_not_there(patient):
    """A drive of Windows: its root has itself for a parent."""
    patient.setattr(doctor.os.path, "exists", lambda _: False)
    assert doctor._disk().status == "FAIL"
    assert "no such disk" in doctor._disk().detail


def test_a_cache_that_is_not_made_yet(patient, tmp_path):
    patient.setenv("MINILLM_CACHE", str(tmp_path / "a" / "b" / "c"))
    assert doctor._disk().status == "OK"


def test_changed_model(patient, tmp_path, smollm_path):
    copy = tmp_path / smollm_path.name
    copy.mkdir()
    for file in smollm_path.iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).symlink_to(file)
        else:
            shutil.copy(file, copy)
    patient.setenv("MINILLM_CACHE", str(tmp_path))
    assert _finding("model").status == "OK"
    (copy / "config.json").write_text((copy / "config.json").read_text().replace("576", "577"))
    assert _finding("model").status == "FAIL"
    assert "config.json" in _finding("model").detail


def test_full_disk_and_memory(patient):
    patient.setattr(doctor, "MIN_DISK_GB", 1e9)
    patient.setattr(doctor, "MIN_MEMORY_GB", 1e9)
    assert _finding("disk").status == _finding("memory").status == "FAIL"


def test_packages(patient):
    versions = {"torch": "2.12.0", "numpy": "1.0", "tqdm": None}

    def version(name):
        if versions.get(name, "") is None:
            raise doctor.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    real = doctor.version
    patient.setattr(doctor, "version", version)
    found = {f.name: f for f in doctor._packages()}
    assert found["torch"].status == "SKIP"  # supported, but not the pin
    assert found["numpy"].status == "FAIL"
    assert found["tqdm"].status == "FAIL"
    assert "make" in found["tqdm"].remedy


def test_kernel_of_another_python(patient):
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel

    patient.setattr(KernelSpecManager, "get_kernel_spec", lambda *_: KernelSpec(argv=["/usr/bin/other-python"]))
    assert _finding("Jupyter kernel").status == "FAIL"
    patient.setattr(KernelSpecManager, "get_kernel_spec", lambda *_: KernelSpec(argv=[sys.executable]))
    assert _finding("Jupyter kernel").status == "OK"

    def none(*_):
        raise NoSuchKernel("python3")

    patient.setattr(KernelSpecManager, "get_kernel_spec", none)
    assert _finding("Jupyter kernel").status == "FAIL"
