"""Settings: one table, one file, nothing silently ignored."""
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from vidgen import settings
from vidgen.settings import SECTIONS, Settings, as_ini, find_file, get, table

ROOT = Path(__file__).resolve().parent.parent
KEYS = [(section, f) for section, c in SECTIONS.items() for f in fields(c)]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("VIDGEN_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(folder, text):
    path = folder / "settings.ini"
    path.write_text(text)
    return path


def test_the_repository_file_is_the_printed_table():
    assert (ROOT / "settings.ini").read_text() == as_ini(), \
        "settings.ini differs from nbs/00_settings.ipynb; write it again: python -c \"import vidgen.settings as s; print(s.as_ini(), end='')\" > settings.ini"


def test_the_repository_file_means_the_packaged_defaults(tmp_path):
    assert [getattr(Settings.load(ROOT / "settings.ini"), s) for s in SECTIONS] == [getattr(Settings(), s) for s in SECTIONS]


@pytest.mark.parametrize("section, f", KEYS, ids=[f"{s}.{f.name}" for s, f in KEYS])
def test_every_key_is_documented_typed_and_its_default_is_right(section, f):
    assert f.metadata["doc"] and type(f.default) is f.type
    assert settings._value(str(f.default), f, f.name) == f.default
    assert settings._value(f"  {f.default} ", f, f.name) == f.default


@pytest.mark.parametrize("section, f", KEYS, ids=[f"{s}.{f.name}" for s, f in KEYS])
def test_every_key_can_be_set_from_the_environment(section, f, monkeypatch):
    special = {"device": "cpu", "url": "sqlite:///other.db", "redis": "redis://host:6379/0"}
    value = f.metadata["choices"][-1] if f.metadata["choices"] else "true" if f.type is bool else special.get(f.name, "3")
    monkeypatch.setenv(f"VIDGEN_{section}_{f.name}".upper(), value)
    assert getattr(getattr(get(), section), f.name) == (True if f.type is bool else f.type(value))
    assert get().sources == {f"{section}.{f.name}": f"VIDGEN_{section}_{f.name}".upper()}


def test_no_file_gives_the_defaults():
    assert find_file() is None or not str(find_file()).startswith(os.getcwd())
    assert Settings.load.__func__ and Settings() == settings._build(None)


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(tmp_path, monkeypatch):
    write(tmp_path, "[train]\nthreads = 2\n[generate]\nseed = 5\n")
    monkeypatch.setenv("VIDGEN_GENERATE_SEED", "7")
    assert (get().train.threads, get().generate.seed, get().model.name) == (2, 7, "shapes-t2v")
    rows = {key: where for key, _, where in table()}
    assert rows["generate.seed"] == "VIDGEN_GENERATE_SEED" and rows["train.threads"].endswith("settings.ini") and rows["model.name"] == "default"


def test_a_parent_folder_is_searched_and_relative_folders_count_from_there(tmp_path, monkeypatch):
    write(tmp_path, f"[model]\npaths = weights{os.pathsep}~/models{os.pathsep}/abs\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert get().root == tmp_path
    assert get().folder(get().storage.runs) == tmp_path / "runs"
    assert get().model_folders() == [tmp_path / "weights", Path.home() / "models", Path("/abs")]


def test_an_edit_counts_at_once(tmp_path):
    path = write(tmp_path, "[train]\nthreads = 2\n")
    assert get().train.threads == 2 and get() is get()
    path.write_text("[train]\nthreads = 3\n")
    os.utime(path, ns=(1, 1))
    assert get().train.threads == 3
    path.unlink()
    assert get().train.threads == 1


def test_somebody_elses_file_is_passed_over_but_a_misspelt_section_is_not(tmp_path, monkeypatch):
    write(tmp_path, "[train]\nthreads = 2\n")
    inner = tmp_path / "other"
    inner.mkdir()
    monkeypatch.chdir(inner)
    write(inner, "[DEFAULT]\nlib_name = x\n[metadata]\nname = y\n")
    assert get().train.threads == 2
    write(inner, "[trian]\nthreads = 4\n")
    with pytest.raises(ValueError, match="unknown section 'trian'; nearest: train"):
        get()


@pytest.mark.parametrize("text, message", [
    ("[train]\nthread = 2\n", r"unknown key of \[train\] 'thread'; nearest: threads"),
    ("[generate]\nthreads = 2\n", r"there is \[train\] threads"),
    ("[modl]\nname = x\n[train]\n", "unknown section 'modl'; nearest: model"),
    ("[Train]\nthreads = 2\n", "unknown section 'Train'; nearest: train"),
    ("[train]\nthreads = two\n", "'two' is not a whole number"),
    ("[train]\nthreads = 2.5\n", "'2.5' is not a whole number"),
    ("[train]\nthreads = 0\n", "must be at least 1"),
    ("[train]\nthreads =\n", "'' is not a whole number"),
    ("[train]\nthreads\n", "settings.ini"),
    ("[train]\nthreads = 2 # all\n", "a comment stands on a line of its own"),
    ("[generate]\nguidance_scale = nan\n", "finite"),
    ("[generate]\nguidance_scale = inf\n", "finite"),
    ("[model]\nprecision = fp61\n", "unknown value 'fp61'; nearest: fp16"),
    ("[model]\ndevice = cuda:x\n", "must look like"),
    ("[tracking]\ntrackers = csv, wandbb\n", "unknown value 'wandbb'; nearest: wandb"),
    ("[storage]\nruns =\n", "must look like"),
    ("[remote]\napi_key = 123\n", "secret"),
    ("[storage]\nroot = s3://user:pw@host/b\n", "holds a password"),
    ("[train]\nthreads = 1\nthreads = 2\n", "already exists"),
    ("[train]\n[train]\n", "already exists"),
    ("threads = 2\n", "no section headers"),
])
def test_a_wrong_file_is_refused_and_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as err:
        Settings.load(path)
    assert "settings.ini" in str(err.value)


def test_files_are_kept_neither_for_no_time_nor_for_ever(tmp_path):
    for line, says in (("uploads_days = 0", "at least 0.01"), ("videos_days = 4000", "at most 3650"), ("temp_hours = inf", "not a finite number"), ("processed_days = -1", "at least"), ("upload_days = 3", "nearest: uploads_days")):
        with pytest.raises(ValueError, match=says):
            Settings.load(write(tmp_path, f"[storage]\n{line}\n"))
    kept = Settings.load(write(tmp_path, "[storage]\nuploads_days = 0.5\n")).storage
    assert (kept.uploads_days, kept.processed_days, kept.videos_days, kept.temp_hours) == (0.5, 3, 30, 1)


def test_bytes_that_are_no_text_and_a_missing_file(tmp_path):
    path = tmp_path / "settings.ini"
    path.write_bytes(b"[train]\n\xff\xfe\x00")
    with pytest.raises(ValueError, match="can't be read as settings"):
        Settings.load(path)
    with pytest.raises(FileNotFoundError):
        Settings.load(tmp_path / "none.ini")


def test_windows_line_ends_a_mark_of_order_and_percent_signs(tmp_path):
    path = tmp_path / "settings.ini"
    path.write_bytes(b"\xef\xbb\xbf[storage]\r\nruns = 100%done\r\n")
    assert Settings.load(path).storage.runs == "100%done"


@pytest.mark.parametrize("name, message", [
    ("VIDGEN_TRAIN_THREAD", "nearest: threads"), ("VIDGEN_TRIAN_THREADS", "nearest: train"), ("VIDGEN_SEED", "unknown section 'seed'")])
def test_a_mistyped_variable_is_refused(monkeypatch, name, message):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=message) as err:
        get()
    assert name in str(err.value)


def test_test_variables_are_left_alone(monkeypatch):
    monkeypatch.setenv("VIDGEN_TEST_ANYTHING", "x")
    assert get().train.threads == 1


def test_a_password_from_the_environment_works_and_is_not_shown(monkeypatch):
    monkeypatch.setenv("VIDGEN_STORAGE_ROOT", "s3://me:secret@host/bucket")
    assert get().storage.root == "s3://me:secret@host/bucket"
    assert ("storage.root", "s3://me:***@host/bucket", "VIDGEN_STORAGE_ROOT") in table()


def test_settings_import_only_the_standard_library():
    code = "import sys; import vidgen.settings, vidgen.errors, vidgen.progress; print([m for m in ('numpy', 'torch', 'rich', 'fastcore', 'nbdev', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
