import json
import re

import numpy as np
import pytest
from blake3 import blake3
from fake_gateway import ADDRESS, rows, spec


@pytest.fixture
def published(call, gateway, model_file, tmp_path):
    np.savez(tmp_path / "x.npz", x=rows())
    done = call("publish", "digits", model_file, "--alias", "prod", "--example", tmp_path / "x.npz", "--tag", "run=7", gateway=gateway)
    assert (done.exit_code, done.stderr) == (0, "")
    return done


def test_publish_says_which_version_it_is_now(published):
    assert published.stdout.startswith("digits:1  ")


@pytest.mark.usefixtures("published")
def test_models_and_show_print_aligned_tables_or_json(call, gateway):
    assert call("models", gateway=gateway).stdout.splitlines() == [
        "NAME    VERSIONS  DEFAULT  FRAMEWORK  SIZE   ALIASES",
        f"digits  1         1        onnx       {gateway.models['digits']['versions'][0]['nbytes']} B  latest=1, prod=1",
    ]
    shown = call("show", "digits", gateway=gateway).stdout
    assert "run=7" in shown
    assert "x     FP32      [-1, 3]" in shown
    assert json.loads(call("models", "--json", gateway=gateway).stdout)["models"] == [gateway.models["digits"]]
    assert json.loads(call("show", "digits", "--json", gateway=gateway).stdout) == gateway.models["digits"]


@pytest.mark.usefixtures("published")
def test_infer_takes_files_or_the_example_and_writes_the_outputs(call, gateway, tmp_path):
    np.save(tmp_path / "x.npy", rows(1))
    for given in (("--input", f"x={tmp_path}/x.npy"), ("--input", f"{tmp_path}/x.npy"), ("--example",)):
        done = call("infer", "digits", *given, "--version", 1, gateway=gateway)
        assert (done.exit_code, done.stdout.splitlines()[0].startswith("y  float32")) == (0, True)
    call("infer", "digits@prod", "--example", "--output", tmp_path / "y.npz", gateway=gateway)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["y"], rows())
    answer = json.loads(call("infer", "digits", "--input", f"{tmp_path}/x.npy", "--json", gateway=gateway).stdout)
    assert answer == {"model": "digits", "version": 1, "outputs": {"y": rows(1).tolist()}}


def test_text_outputs_are_printed_as_text(call, gateway, model_file, tmp_path):
    gateway.inputs[:] = [spec("x", "BYTES", -1)]
    gateway.outputs[:] = [spec("y", "BYTES", -1)]
    call("publish", "words", model_file, gateway=gateway)
    np.save(tmp_path / "x.npy", np.array(["grüß"]))
    answer = json.loads(call("infer", "words", "--input", tmp_path / "x.npy", "--json", gateway=gateway).stdout)
    assert answer["outputs"] == {"y": ["grüß"]}


@pytest.mark.usefixtures("published")
def test_what_infer_can_not_read_is_a_usage_error(call, gateway, tmp_path):
    (tmp_path / "junk.npy").write_bytes(b"junk")
    np.save(tmp_path / "x.npy", rows())
    for given in (
        (),
        ("--example", "--input", "x.npy"),
        ("--input", tmp_path / "none.npy"),
        ("--input", tmp_path / "junk.npy"),
        ("--input", tmp_path / "x.npz"),
        ("--input", tmp_path / "x.npy", "--input", tmp_path / "x.npy"),
        ("--input", f"x={tmp_path}/x.npy", "--input", f"x={tmp_path}/x.npy"),
        ("--example", "--timeout", "0"),
    ):
        assert call("infer", "digits", *given, gateway=gateway).exit_code == 2


@pytest.mark.usefixtures("published")
def test_alias_rollback_and_trust_say_what_they_did(call, gateway, model_file):
    model_file.write_bytes(b"another")
    call("publish", "digits", model_file, gateway=gateway)
    assert call("alias", "digits", "prod", 2, gateway=gateway).stdout == "digits@prod is now digits:2\n"
    assert call("rollback", "digits", gateway=gateway).stdout == "digits@prod is now digits:1 (was digits:2)\n"
    assert call("rollback", "digits", "--alias", "latest", gateway=gateway).stdout == "digits@latest is now digits:1 (was digits:2)\n"
    assert call("trust", "ab12", "--code", gateway=gateway).exit_code == 0
    assert gateway.trusted == {"ab12": ["code"]}
    assert call("trust", "ab12", gateway=gateway).exit_code == 2


@pytest.mark.usefixtures("published")
def test_verify_exits_1_when_something_is_wrong(call, gateway):
    assert call("verify", "digits", gateway=gateway).stdout.endswith("all well\n")
    digest = blake3(b"a model").hexdigest()
    gateway.blobs[digest] = b"altered"
    done = call("verify", "digits:1", gateway=gateway)
    assert (done.exit_code, digest[:16] in done.stdout) == (1, True)
    done = call("verify", "digits", "--json", gateway=gateway)
    assert (done.exit_code, json.loads(done.stdout)["problems"][0]["digest"]) == (1, digest)


@pytest.mark.usefixtures("published")
def test_export_writes_the_files_back(call, gateway, tmp_path):
    assert call("export", "digits", tmp_path / "out", gateway=gateway).exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["digits.onnx"]
    assert (tmp_path / "out" / "digits.onnx").read_bytes() == b"a model"


@pytest.mark.usefixtures("published")
def test_status_shows_the_whole_lab(call, gateway):
    shown = call("status", gateway=gateway).stdout
    for word in ("worker-1", "running", "digits", gateway.url):
        assert word in shown
    assert set(json.loads(call("status", "--json", gateway=gateway).stdout)) == {
        "address",
        "gateway",
        "data",
        "services",
        "workers",
        "models",
        "swarm",
    }


def test_status_says_whether_other_labs_can_find_this_one(call, gateway):
    shown = call("status", gateway=gateway).stdout
    assert re.search(r"^swarm    on for \d.*, 3 connected; reachable from everywhere$", shown, re.MULTILINE)
    assert json.loads(call("status", "--json", gateway=gateway).stdout)["swarm"]["address"] == ADDRESS


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("show", "nope"), "unknown_model"),
        (("publish", "digits", "nowhere.onnx"), "no_model_file"),
        (("infer", "Bad!", "--example"), "bad_name"),
    ],
)
def test_an_error_is_one_line_with_its_code_and_exit_1(call, gateway, arguments, code):
    done = call(*arguments, gateway=gateway)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(f"[{code}]\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("published")
def test_a_name_from_elsewhere_can_not_steer_the_terminal(call, gateway):
    gateway.models["digits"]["versions"][0]["tags"] = {"x": "\x1b[2J\nfake"}
    assert "\x1b" not in call("show", "digits", gateway=gateway).stdout
