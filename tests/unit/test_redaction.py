"""What looks like a secret is readable nowhere: one function hides it, wherever text is printed or recorded."""

from __future__ import annotations

import base64
import importlib
import json
import logging
import os
import pkgutil
import random
import re
import string
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from ray._common.utils import load_class
from ray._private import ray_constants

import dermray
from dermray import redaction, secret_forms, storage, tracking
from dermray.config import Config, TrackingConfig
from dermray.errors import StorageError
from dermray.redaction import without_secrets
from tests.conftest import ROOT

CANARY = "Kan4ry-S3cret"
LOGIN = base64.b64encode(f"u:{CANARY}".encode()).decode()
BODY = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7VJTUt9Us8cKj"
ACCOUNT_KEY = base64.b64encode(b"x" * 64).decode()
JWT = ".".join(
    base64.urlsafe_b64encode(part).decode().rstrip("=")
    for part in (b'{"alg": "HS256"}', b'{"sub": "me"}', b"a signature of bytes")
)
SHAPES = ("A1b2C3d4E5f6G7h8I9j0", "AKIAABCDEFGHIJKLMNOP")
FORMS = (
    f"s3://AKIDUSER:{CANARY}@bucket/x",
    f"DERMRAY_SERVE_TOKENS={CANARY},{CANARY}2",
    f"export DERMRAY_SERVE_TOKENS=anna:{CANARY}",
    f"-----BEGIN PRIVATE KEY-----\n{BODY}\n{BODY}\n-----END PRIVATE KEY-----",
    f"+-----BEGIN RSA PRIVATE KEY-----\n+{BODY}\n+{BODY}\n",
    f" {BODY}\n+{BODY}\n",
    f"Authorization: Basic {LOGIN}",
    f"Authorization: Bearer {CANARY}",
    f"{{'Authorization': 'Bearer {CANARY}'}}",
    f"https://a.blob.core.windows.net/c?sv=2020&sig={CANARY}%3D&se=1",
    f"https://b.s3.amazonaws.com/k?X-Amz-Credential=A/2026&X-Amz-Signature={CANARY}",
    f"it is {JWT} then",
    f"postgresql://u:p@{CANARY}@h/d",
    f"postgresql://u:pa {CANARY}@h/d",
    f"postgresql://u:p/{CANARY}@h/d",
    f"postgresql://u:{CANARY}@h/d",
    f"mysql+pymysql://u:{CANARY}@h:3306/d?ssl=1",
    f"redis://:{CANARY}@h:6379/0",
    f"https://{CANARY}@host/x",
    f"AccountKey={ACCOUNT_KEY};x",
    f"Server=h;Password={CANARY};Database=x",
    f"password: {CANARY} with blanks",
    f'password = "two words {CANARY}"',
    f"db_password: 'a {CANARY}'",
    f"aws_secret_access_key = {CANARY}Abc",
    f"AWS_SECRET_ACCESS_KEY={CANARY}",
    f"hf_{SHAPES[0]}",
    f"sk-proj-{SHAPES[0]}",
    f"ghp_{SHAPES[0]}A1b2C3d4E5f6G7h8",
    f"glpat-{SHAPES[0]}",
    f"xoxb-123456789012-abcdefghijkl{SHAPES[0]}",
    f"X-Api-Key: {CANARY}",
    f"Cookie: session={CANARY}",
    f'{{"token": "{CANARY}"}}',
    f"{{'password': '{CANARY}'}}",
    f"?access_token={CANARY}&x=1",
    SHAPES[1],
    f"--token {CANARY}",
    f"--password={CANARY}",
    f"curl -u me:{CANARY} https://h",
    f"curl --user me:{CANARY} https://h",
    f'"{{\\"password\\": \\"{CANARY}\\"}}"',
    f'{{"a": "{{\\"api_key\\":\\"{CANARY}\\"}}"}}',
    f"<SecretAccessKey>{CANARY}</SecretAccessKey>",
    f"password: |\n  {CANARY}",
    f"machine h login u password {CANARY}",
    f"machine h\n  login u\n  password {CANARY}",
    f"default login u password {CANARY}",
    f"h.example:5432:db:user:{CANARY}",
    f"*:*:*:user:{CANARY}",
    f"mysql -u me -p{CANARY} db",
    f"mariadb-dump -p'two words {CANARY}' db",
    *(f"{word}={CANARY}" for word in ("passwort", "senha", "wachtwoord", "contrasena", "mot_de_passe")),
    *(f"{word} {CANARY}" for word in ("Kennwort:", "contraseña:", "contrasen\u0303a:", "mot de passe :", "пароль:")),
    f"密码\uff1a{CANARY}",
    f"SecretStr('{CANARY}')",
    f'SecretBytes(b"{CANARY}")',
    f'{{"auths": {{"h": {{"auth": "{LOGIN}"}}}}}}',
    f'"{{\\"auth\\": \\"{LOGIN}\\"}}"',
    f"//h/:_auth={LOGIN}",
    *(f"x?next=a%{percent}3Ftoken%{percent}3D{CANARY}%{percent}26x" for percent in ("", "25")),
    f"%22password%22%3A%20%22{CANARY}%22",
    f"%3Fsig%3D{CANARY}",
    f"postgresql://u:{CANARY}%40h/d",
    f"s3%3A%2F%2FKEY%3A{CANARY}%40bucket",
    f"pass\u200bword={CANARY}",
    f"password\u2060={CANARY}",
    f"\x1b[33mtoken\x1b[0m: \x1b[1m{CANARY[:6]}\x1b[0m{CANARY[6:]}",
    f"'\\x1b[33mtoken\\x1b[0m: {CANARY}'",
    f"ghp_A1b2\u00ad{SHAPES[0]}A1b2C3d4E5f6",
)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("around", ["%s", "error: %s", "+%s"])
def test_no_form_of_a_secret_stays_readable(form: str, around: str) -> None:
    kept = re.sub("[\u00ad\u200b\u2060]|\x1b\\[\\d*m", "", without_secrets(around % form))
    assert redaction.HIDDEN in kept
    assert not [one for one in (CANARY, LOGIN, BODY, ACCOUNT_KEY, JWT[-12:], *SHAPES) if one in kept]


@pytest.mark.parametrize(
    "text",
    [
        "tokens = tokenizer(texts)",
        "api_key_env: LLM_KEY",
        "max_tokens: 4096",
        "token = read()",
        f"sha256 {'ab12' * 16}",
        "http://127.0.0.1:5000/path@v1",
        "models:/dermray@champion",
        "abfs://container@account.dfs.core.windows.net/x",
        "sqlite:////tmp/x/mlflow.db",
        "password: str = Field(...)",
        "context_length: 77 tokens",
        'secret = os.environ["X"]',
        "Basic information about",
        "padding_token_id: 49407",
        "unknown key 'tokn', did you mean 'token'?",
        "\x1b[1mbold\x1b[0m and a soft\u00adhyphen",
        "\ufeffid,image",
        "mysql -P3306 -p db",
        "the default password is asked for by this machine",
        "a.py:12:5:error:unexpected",
        "2001:0:db8:abcd:1234:5678",
        "SecretStr('**********')",
        "auth: required",
        "max_tokens%3D4096 and x%3D%22y%22",
        "http%3A%2F%2F127.0.0.1%3A8080%2Fa%40b",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_what_the_environment_holds_is_hidden_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMRAY_SERVE_TOKENS", f"{CANARY}-one,anna:{CANARY}-two")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://u:{CANARY}%40x@h/d")
    kept = without_secrets(f"refused {CANARY}-one and {CANARY}-two and {CANARY}@x")
    assert CANARY not in kept


PIECES = (
    "a", "://a:", "token=", "A_", "TOKEN_", "eyJ.", "eyJ-", "\n+", '"', "x-a-", "?key=&", "sk-", "//", "key    ",
    "-----BEGIN PRIVATE KEY-----.", "password: ", "\n- token", "aws ", "\x1b[",
    "\x1b]", "%3A%2F%2Fa", "://a%3A", "mysql -", "machine a ", "default login a ", "a:1:a:a:",
    "token%3D", "auth: ", "SecretStr('", "a:1:", "machine machine ", "f_", "key=", "password: |\n ", "cl", "\\",
)  # fmt: skip


def test_hiding_costs_in_proportion_to_the_text_whatever_it_is() -> None:
    # One text of each kind, 200,000 characters long: a pattern that goes back over it all would take hours.
    code = (
        "import sys\nfrom dermray.redaction import without_secrets\n"
        "for piece in sys.argv[1:]: without_secrets(piece * (200_000 // len(piece)))"
    )
    subprocess.run([sys.executable, "-c", code, *PIECES], check=True, timeout=120)


EVERY_PATTERN = (
    *(one for one in vars(secret_forms).values() if isinstance(one, re.Pattern)),
    *secret_forms.known_shapes(),
)
CATEGORIES = {"DIGIT": str.isdigit, "WORD": lambda char: char.isalnum() or char == "_", "SPACE": str.isspace}


def drawn(tree: Iterable[tuple[Any, Any]], chance: random.Random) -> str:
    """A text as a parsed pattern wants it, but for what it wants before and behind."""
    text = ""
    for kind, value in tree:
        match str(kind):
            case "LITERAL":
                text += chr(value)
            case "NOT_LITERAL":
                text += chance.choice([char for char in string.printable if char != chr(value)])
            case "ANY":
                text += chance.choice("aZ1 ")
            case "IN":
                text += chance.choice([char for char in string.printable if is_in(char, value)] or [chr(value[0][1])])
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                low, high, of = value
                text += "".join(drawn(of, chance) for _ in range(chance.randint(low, min(high, max(low + 2, 12)))))
            case "BRANCH":
                text += drawn(chance.choice(value[1]), chance)
            case "SUBPATTERN":
                text += drawn(value[-1], chance)
    return text


def is_in(char: str, of: list[tuple[Any, Any]]) -> bool:
    for kind, value in of:
        match str(kind):
            case "LITERAL":
                found = ord(char) == value
            case "RANGE":
                found = value[0] <= ord(char) <= value[1]
            case "CATEGORY":
                name = str(value).removeprefix("CATEGORY_")
                found = CATEGORIES[name.removeprefix("NOT_")](char) != name.startswith("NOT_")
            case _:
                found = False
        if found:
            return str(of[0][0]) != "NEGATE"
    return str(of[0][0]) == "NEGATE"


def test_no_line_with_a_secret_is_without_its_sign() -> None:
    chance = random.Random(15)
    texts = list(FORMS)
    for pattern in EVERY_PATTERN:
        tree = re._parser.parse(pattern.pattern, pattern.flags)
        for _ in range(15):
            text = drawn(tree, chance)
            if pattern.flags & re.IGNORECASE:
                text = "".join(chance.choice([char, char.swapcase()]) for char in text)
            texts.append(chance.choice(["", " ", "://", "-", '"']) + text + chance.choice(["", " ", "</"]))
    hiding = set()
    for line in (line for text in texts for line in text.splitlines()):
        low = secret_forms.lowered(line)
        assert len(low) == len(line)
        for number, form in enumerate(secret_forms.FORMS):
            if form.hide(line) != line:
                hiding.add(number)
                assert form.may_be_in(line, low), (number, line)
                assert secret_forms._lines_with_signs(line, low) == [(0, len(line))], line
    assert len(hiding) == len(secret_forms.FORMS)


@pytest.mark.parametrize("letters", ["to\u212aen", "\u017fecret", "ap\u0131_\u212aey", "AP\u0130_KEY"])
def test_letters_that_a_pattern_takes_for_others_hide_no_name(letters: str) -> None:
    assert CANARY not in without_secrets(f"{letters}={CANARY}")


def test_only_lines_with_a_secret_are_changed() -> None:
    secret, lines = f"token={CANARY}", [f"line {number}: nothing to hide" for number in range(40)]
    for end in ("\n", "\r\n", "\r", "\x0b", "\u2028"):
        for place in (0, 7, 39):
            text = end.join([*lines[:place], secret, *lines[place + 1 :]])
            assert without_secrets(text) == text.replace(CANARY, redaction.HIDDEN)


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_is_hidden_wherever_in_a_long_line_it_stands(form: str) -> None:
    secrets = (CANARY, LOGIN, BODY, ACCOUNT_KEY, JWT[-12:], *SHAPES)
    for before in (1_970, 1_985, 1_999):
        kept = without_secrets(f"{'word ' * (before // 5)}{'.' * (before % 5)} {form}")
        hits = [one for one in secrets if one in kept]
        # What only a line of its own tells for a secret is none in the middle of one.
        assert not hits or not form.startswith("password: ")


def test_a_long_secret_is_hidden_to_its_end() -> None:
    for form in (f"token={'aB1' * 3000}", f'password = "{"two words " * 900}"', f"eyJ{'aB1' * 900}.{'aB1' * 900}.sig"):
        assert len(without_secrets(form)) < 40
    body = "aB1+" * 1500
    assert len(without_secrets(f"-----BEGIN PRIVATE KEY-----\\n{body}")) < 40


def test_credentials_in_a_uri_are_refused_without_being_shown(tmp_path: Path) -> None:
    for uri in (f"s3://KEY:{CANARY}@bucket/x", f"https://h/x?X-Amz-Signature={CANARY}"):
        with pytest.raises(StorageError, match="must hold no user, password or signature") as caught:
            storage.exists(uri)
        assert CANARY not in str(caught.value)
    command = [sys.executable, str(ROOT / "jobs/prepare.py"), "source=csv", f"input=s3://K:{CANARY}@b/x", "output=o"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert CANARY not in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1


def test_logs_and_uncaught_errors_show_no_secret() -> None:
    code = (
        "import logging, sys, threading\n"
        "from dermray import entry\n"
        "uri = sys.argv[1]\n"
        "def boom(): raise ValueError(uri)\n"
        "def main():\n"
        "    logging.getLogger('x').warning('no answer from %s', uri)\n"
        "    try: boom()\n"
        "    except ValueError: logging.getLogger('x').exception('failed')\n"
        "    thread = threading.Thread(target=boom); thread.start(); thread.join()\n"
        "    thread = threading.Thread(target=sys.exit, args=(uri,)); thread.start(); thread.join()\n"
        "    boom()\n"
        "entry.run_job(main)\n"
    )
    command = [sys.executable, "-c", code, f"postgresql://u:{CANARY}@h/d"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("postgresql://(hidden)@h/d") == 4
    assert CANARY not in done.stderr


class Settings(Config):
    endpoint: str = f"https://u:{CANARY}@h/v1"
    password: str = CANARY
    names: tuple[str, ...] = (f"Bearer {CANARY}",)


def every_config() -> list[type[Config]]:
    for module in pkgutil.walk_packages(dermray.__path__, "dermray."):
        importlib.import_module(module.name)
    found, waiting = set(), [Config]
    while waiting:
        waiting += (new := set(waiting.pop().__subclasses__()) - found)
        found |= new
    return sorted((one for one in found if one.__module__.startswith("dermray.")), key=lambda one: one.__qualname__)


def test_what_is_recorded_of_settings_without_secrets_is_what_they_are() -> None:
    configs = every_config()
    assert len(configs) > 25
    for config in configs:
        given = {name: "images/of_one" for name, field in config.model_fields.items() if field.is_required()}
        tree = config.model_construct(**given).model_dump(mode="json", warnings=False)
        assert redaction.hidden(tree) == tree, config


@pytest.mark.parametrize("value", ["LLM_API_KEY", "max_completion_tokens", "images/of_one", "a few words"])
def test_names_that_only_speak_of_secrets_keep_their_values(value: str) -> None:
    tree = {"max_tokens_key": value, "api_key_env": value, "token_file": value, "max_tokens": 512, "tokenizer": value}
    assert redaction.hidden({"rewrite": tree}) == {"rewrite": tree}


@pytest.mark.parametrize("file", sorted((*ROOT.glob("jobs/configs/*.yaml"), *ROOT.glob("tune/**/*.yaml"))), ids=str)
def test_recipes_and_spaces_hold_nothing_that_is_hidden(file: Path) -> None:
    text = file.read_text()
    assert without_secrets(text) == text
    tree = yaml.safe_load(text)
    assert redaction.hidden(tree) == tree


def test_nothing_that_a_run_records_holds_a_canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMRAY_SERVE_TOKENS", f"{CANARY}-env")
    config = TrackingConfig(
        uri=f"sqlite:///{tmp_path}/m.db", spool=str(tmp_path / "spool"), system_metrics_interval_s=0
    )
    state = str(tmp_path / "mlflow.json")
    with tracking.run(config, kind="prepare", name=f"x {CANARY}-env", resolved=Settings(), state_uri=state) as current:
        current.set_tags({"note": f"postgresql://u:{CANARY}@h/d"})
        current.log_text(f"token {CANARY}-env", "notes.txt")
        current.log_artifact("input", "raw", f"https://u:{CANARY}@h/d", "f" * 64)
        assert current.connected()
    client = MlflowClient(config.uri)
    assert client.get_run(current.id).data.params["password"] == redaction.HIDDEN
    found = [file for file in tmp_path.rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()]
    assert found == []
    assert CANARY not in Settings().to_yaml()
    assert CANARY not in json.dumps(Settings().recorded())


def test_a_worker_of_ray_data_hides_secrets_in_its_logs() -> None:
    code = (
        "import logging, sys\n"
        "from dermray import pieces\n"
        "pieces._Worker(print)\n"
        "logging.getLogger('x').warning('no answer from %s', sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, f"postgresql://u:{CANARY}@h/d"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "no answer from postgresql://(hidden)@h/d" in done.stderr


WORKER = """
import logging, pickle, sys, traceback
import ray
from dermray import redaction
sys.stdout.write("driver\\n")
assert not isinstance(sys.stdout, redaction._Printed)
ray._private.worker.global_worker.set_mode(ray.WORKER_MODE)
uri, token = sys.argv[1:]
redaction.install()
redaction.install()
print("at", uri)
print("token", token, sep="=")
print("begun at", uri, end="", flush=True)
sys.stdout.writelines(["\\n", "one ", f"{token}\\n"])
sys.stdout.write("x" * redaction.MAX_LINE_CHARS)
sys.stdout.write("y")
print(f"\\n{uri}", file=sys.stderr)
logging.getLogger("x").warning("no answer from %s", uri)
try:
    raise ExceptionGroup(uri, [ValueError(uri)])
except ExceptionGroup as error:
    told = "".join(traceback.format_exception(error))
    sys.__stderr__.write(told)
    assert told.count("Traceback") == 1
    traceback.print_exc()
assert sys.stdout.fileno() == 1
sys.stdout.write("the end")

class Odd(Exception):
    pass

inner = ValueError(uri, (uri, 3), {"password": token})
inner.add_note(uri)
inner.itself = inner
odd = Odd(f"at {uri}", 5)
odd.where = [uri]
for cause in (ExceptionGroup(uri, [inner]), odd, OSError(2, f"no {uri}")):
    made = ray.exceptions.RayTaskError("f", "trace", cause, proctitle="p", pid=1, ip="h")
    for secret in sys.argv[1:]:
        assert secret.encode() not in pickle.dumps(made), (cause, secret)
assert inner.args[1] == ("postgresql://(hidden)@h/d", 3) and odd.args[1] == 5
"""


def test_a_worker_of_ray_hides_secrets_in_what_it_prints_and_in_every_traceback() -> None:
    """Ray keeps both in files: also what is printed in pieces, and what has no end of a line yet."""
    uri = f"postgresql://u:{CANARY}@h/d"
    environment = {**os.environ, "SOME_TOKEN": "a-token-of-the-environment"}
    command = [sys.executable, "-c", WORKER, uri, environment["SOME_TOKEN"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    hidden = "postgresql://(hidden)@h/d"
    printed = ["driver", f"at {hidden}", "token=(hidden)", f"begun at {hidden}", "one (hidden)"]
    long = "x" * redaction.MAX_LINE_CHARS
    assert done.stdout.splitlines() == [*printed, f"{long}ythe end"]
    assert CANARY not in done.stdout + done.stderr
    assert done.stderr.count(hidden) == 6


def test_a_worker_of_ray_hides_secrets_as_soon_as_it_loads_the_redaction() -> None:
    """Without a call: on a cluster that was started elsewhere nobody has told it to make one."""
    code = (
        "import sys, ray\n"
        "ray._private.worker.global_worker.set_mode(ray.WORKER_MODE)\n"
        "from dermray import storage\n"
        "print(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, f"postgresql://u:{CANARY}@h/d"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "postgresql://(hidden)@h/d\n"


def test_the_nodes_of_an_own_cluster_are_told_to_have_their_workers_hide_secrets() -> None:
    """By the name that this version of Ray reads."""
    (name,) = redaction.OF_RAY_NODES
    assert name == ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR
    assert load_class(redaction.OF_RAY_NODES[name]) is redaction.install


def test_a_record_of_a_log_keeps_its_form() -> None:
    record = redaction._Record("x", logging.INFO, "f.py", 1, "%s of %d", ("a", 3), None)
    assert record.getMessage() == "a of 3"
