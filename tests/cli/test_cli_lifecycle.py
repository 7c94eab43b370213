import datetime as dt
import io
import json
import socket
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tether._version import __version__
from tether.cli import tether
from tether.cli.logs import last_lines

COMMANDS = {
    "accept", "alias", "allow", "diff", "disallow", "doctor", "down", "enrol", "events", "export", "gateway", "gc", "hold", "infer",
    "invite", "lend", "logs", "manager", "models", "orchestrator", "peers", "policy", "publish", "repair", "replicate", "rm", "rollback",
    "quarantine", "restart", "rollout", "rotate", "serving", "show", "status", "trust", "up", "verify", "worker", "drain", "explain",
}  # fmt: skip


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=30, check=False)


def test_python_m_tether_is_the_command():
    done = python("-m", "tether", "--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert python("-m", "tether", "--version").stdout == f"tether {__version__}\n"


def test_help_loads_nothing_heavy():
    program = (
        "import sys; from tether.cli import tether\n"
        "try: tether(['--help'])\n"
        "finally: print(sorted(set(sys.modules) & {'numpy', 'aiohttp', 'dask', 'zarr', 'psutil', 'cryptography'}), file=sys.stderr)"
    )
    assert python("-c", program).stderr == "[]\n"


def test_it_is_a_command_of_dask_too():
    assert "up  " in python("-m", "dask", "tether", "--help").stdout


def test_every_command_explains_itself(call):
    assert set(tether.list_commands(None)) == COMMANDS
    for name in COMMANDS - {"gateway", "orchestrator", "worker", "manager"}:
        done = call(name, "--help")
        assert (done.exit_code, done.stdout.startswith(f"Usage: tether {name} ")) == (0, True)


@pytest.mark.parametrize(
    "arguments", [("nope",), ("up", "--workers", "-1"), ("publish", "digits"), ("publish", "a", "b", "--tag", "x"), ("up", "--port", "x")]
)
def test_wrong_usage_exits_2(call, arguments):
    assert call(*arguments).exit_code == 2


@pytest.mark.parametrize("command", ["status", "down", "models"])
def test_without_a_lab_the_error_says_so(call, command):
    done = call(command)
    assert (done.exit_code, done.stderr.endswith("[no_lab]\n")) == (1, True)


@pytest.mark.parametrize("name", ["gateway", "orchestrator", "worker", "manager"])
def test_a_service_gets_its_arguments_as_they_are(call, monkeypatch, name):
    got = []
    module = type(sys)(f"tether.{name}.service")
    module.main = got.append
    monkeypatch.setitem(sys.modules, module.__name__, module)
    done = call(name, "tls://h:1", "--port", "5", "--help", "-x")
    assert (done.exit_code, got) == (0, [["tls://h:1", "--port", "5", "--help", "-x"]])


def test_logs_prints_the_ends_of_all_or_of_one(call, tmp_path):
    folder = tmp_path / "home" / "logs"
    folder.mkdir(parents=True)
    (folder / "gateway.log").write_text("".join(f"line {index}\n" for index in range(100)))
    (folder / "worker-1.log").write_text("started\n")
    assert call("logs", "gateway", "-n", 2).stdout == "line 98\nline 99\n"
    assert call("logs", "-n", 1).stdout == "gateway        | line 99\nworker-1       | started\n"
    done = call("logs", "../secret")
    assert (done.exit_code, "gateway, worker-1" in done.stderr) == (1, True)


def test_without_logs_the_error_says_so(call):
    assert call("logs").stderr.endswith("[not_found]\n")


def test_logs_follows_what_is_written(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    log = folder / "gateway.log"
    log.write_text("one\n")
    command = [sys.executable, "-u", "-m", "tether", "logs", "gateway", "-f", "--data", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout.readline() == "one\n"
        with log.open("a") as file:
            file.write("two\n")
        assert follower.stdout.readline() == "two\n"
        follower.terminate()


@pytest.mark.parametrize("count", [0, 1, 5, 10_000, 50_000])
def test_last_lines_reads_from_the_end(count):
    lines = [f"line number {index}\n".encode() for index in range(20_000)]
    assert last_lines(io.BytesIO(b"".join(lines)), count) == (lines[-count:] if count else [])
    assert last_lines(io.BytesIO(b""), count) == []


def checks(done):
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_doctor_finds_this_machine_ready_and_writes_nothing(call, tmp_path):
    done = call("doctor", "--json")
    found = checks(done)
    assert (done.exit_code, found["python"]["state"], found["numpy"]["state"]) == (0, "ok", "ok")
    assert not (tmp_path / "home").exists()
    assert "DETAIL" in call("doctor").stdout


def test_doctor_names_who_holds_a_port(call, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr("tether.cli.doctor.GATEWAY_PORT", port)
        monkeypatch.setattr("tether.cli.doctor.MANAGER_PORT", port)
        assert "pid" in checks(call("doctor", "--json"))[f"port {port}"]["detail"]


def certificate(days):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    dated = builder.not_valid_before(now - dt.timedelta(days=9)).not_valid_after(now + dt.timedelta(days=days))
    return dated.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_doctor_reads_the_certificates(call, tmp_path):
    folder = tmp_path / "home" / "tls"
    folder.mkdir(parents=True)
    for name, data in {"good": certificate(100), "soon": certificate(3), "over": certificate(-1), "bad": b"", "good-key": b""}.items():
        (folder / f"{name}.pem").write_bytes(data)
    done = call("doctor", "--json")
    states = {name.removeprefix("certificate "): check["state"] for name, check in checks(done).items() if name.startswith("certificate")}
    assert (done.exit_code, states) == (1, {"good": "ok", "soon": "note", "over": "fail", "bad": "fail"})


def test_doctor_fails_where_no_data_can_be_kept(call, tmp_path):
    (tmp_path / "home").write_text("a file")
    done = call("doctor", "--json")
    assert (done.exit_code, checks(done)["data folder"]["state"]) == (1, "fail")
