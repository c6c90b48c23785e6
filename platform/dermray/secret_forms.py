"""What secrets look like, form by form, each with a cheap sign without which a text holds none of it.

Shapes of known services' keys are those of detect-secrets; ours are the user part of a URI, assignments to names that
speak of secrets, headers, signatures in query strings and blocks of private keys. `dermray.redaction` hides them.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

HIDDEN = "(hidden)"
# Of detect-secrets; its detectors of entropy would hide our digests, and that of IP addresses hides no secret. Those of
# npm and OpenAI go back over all that they have read: `_SHAPED` has their shapes.
_DETECTORS = {
    "artifactory": "ArtifactoryDetector",
    "aws": "AWSKeyDetector",
    "azure_storage_key": "AzureStorageKeyDetector",
    "cloudant": "CloudantDetector",
    "discord": "DiscordBotTokenDetector",
    "github_token": "GitHubTokenDetector",
    "gitlab_token": "GitLabTokenDetector",
    "ibm_cloud_iam": "IbmCloudIamDetector",
    "ibm_cos_hmac": "IbmCosHmacDetector",
    "mailchimp": "MailchimpDetector",
    "pypi_token": "PypiTokenDetector",
    "sendgrid": "SendGridDetector",
    "slack": "SlackDetector",
    "softlayer": "SoftlayerDetector",
    "square_oauth": "SquareOAuthDetector",
    "stripe": "StripeDetector",
    "telegram_token": "TelegramBotTokenDetector",
    "twilio": "TwilioKeyDetector",
}
# Every pattern takes time in proportion to the text, whatever it is: what could begin anywhere has a bounded length.
_WORDS = (
    r"(?:secret|token|passw(?:or)?d|passwd|passphrase|pwd|credential|api[_-]?key|access[_-]?key|account[_-]?key"
    r"|private[_-]?key|signing[_-]?key|encryption[_-]?key|shared[_-]?access[_-]?(?:key|signature)"
    # "Password" in German, Spanish, French, Portuguese, Dutch, Russian and Chinese.
    r"|passwort|kennwort|contrase(?:ñ|n\u0303?)a|mot[ _-]?de[ _-]?passe|senha|wachtwoord|пароль|密[码碼])"
)
# Most letters begin none of them.
_SECRET_WORD = rf"(?=[acekmpstwп密]){_WORDS}"
# What a terminal or a page does not show, also as JSON and `repr` write it: colours and other codes, characters without
# a width. Between two letters of a name or a secret it would hide them from the patterns, and from nobody else.
INVISIBLE = re.compile(
    # One character first, as most texts have none of these.
    r"[\x00-\x08\x0e-\x1b\x7f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    r"\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U0001d173-\U0001d17a\U000e0000-\U000e0fff\\]"
    r"(?:(?<=\x1b)(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\))"
    r"|(?<=\\)(?:(?:x1b|u001b|033|e)\[[0-9;]{0,32}m|u(?:00ad|200[b-f]|202[a-e]|206[0-9a-f]|feff)|xad)|(?<!\\))"
)
# `user:password@` with anything in the password but a quote or the next URI; `host:8080/…@…` is none.
USERINFO = re.compile(
    r"""(?ix) (?<=://) (?: [^\s:/@?\#"'<>]* : (?!\d{1,5}(?:[/?\#\s]|$)) (?=[^\s"'<>])
        (?: (?:(?!://)[^\s"'<>])* @ | (?:(?!://)[^\n@"'<>]){1,200} @ )
        | (?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://) [^\s:/@?\#"'<>]+ @ )"""
)
_QUERY = re.compile(
    r"""(?ix) ([?&;] (?:sig|signature|x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid
        |googleaccessid|[\w.-]*(?:token|secret|passw(?:or)?d|pwd|api[_-]?key|access[_-]?key|key)) =) [^&\s"'<>;]+"""
)
_HEADER = re.compile(
    r"""(?ix) \b((?:proxy-)?authorization|(?:set-)?cookie|x-[\w-]{0,64}(?:key|token|signature))
        (["']?\s*[:=]\s*["']?(?:(?:basic|bearer|digest|negotiate|token|aws4-hmac-sha256)\s+)?) [^"'\n\\]{4,}"""
)
# What detect-secrets does not know, or does not take whole: the signature of a JWT, tokens of Hugging Face and others.
_SHAPED = re.compile(
    r"(?:(?<![\w-])eyJ[\w-]{8,}|\beyJ[\w=-]{8,512})\.[\w=-]{4,}(?:\.[\w=-]*)?|\bhf_\w{20,}|\bsk-[\w-]{20,}"
    r"|\bgithub_pat_\w{20,}|\bgh[pousr]_\w{20,}|\bnpm_\w{20,}|sk-[\w-]{0,200}T3BlbkFJ\w{20}"
)
_OPTION = re.compile(
    r"(?i)(?<![\w-])(--?(?:[a-z]+-)*(?:token|password|passwd|secret|api-key|access-key)[ ]+"
    r"|(?:-u|--user)[ =]+[^\s:]{1,64}:)[^\s\"']{6,}"
)
# `-pPASSWORD`, without a blank, is MySQL's way; `-P` is a port.
_ATTACHED = re.compile(
    r"((?:\bmysql[\w.-]{0,40}|\bmariadb[\w.-]{0,40})(?:[ \t][^\n|;&]{0,400}?)?[ \t]-p|\bsshpass[ \t]+-p[ \t]*)"
    r"(?:'[^'\n]+'|\"[^\"\n]+\"|[^\s\"']+)"
)
# `machine HOST login USER password PASSWORD`, also over several lines; `.pgpass`: `host:port:database:user:password`.
_NETRC = re.compile(
    r"(?i)\b((?:machine[ \t]{1,40}\S{1,255}|default(?=\s{1,40}login\b))\s{1,40}"
    r"(?:(?:login|user|account)\s{1,40}\S{1,255}\s{1,40}){0,2}passw(?:or)?d\s{1,40})\S+"
)
_PGPASS = re.compile(
    r"(?<![^\s\"'=+(])((?:[\w.*-]{1,255}|\[[0-9A-Fa-f:]{2,45}\]):(?:\d{1,5}|\*)(?::(?:\*|[A-Za-z_][^\s:\"']{0,62})){2}:)"
    r"(?:\\.|[^\s:\\\"']){6,}(?![^\s\"',)])"
)
# As pydantic wraps them, but for the stars that it shows; and logins of Docker's and npm's settings.
_WRAPPED = re.compile(r"""\b(Secret(?:Str|Bytes)\(\s{0,8}[rbu]?)(?:'(?!\*+')[^'\n]+'|"(?!\*+")[^"\n]+")""")
_AUTH = re.compile(
    r"""(?i)(?<![a-z])(auth(?:\\{0,8}["'])?\s{0,8}[:=]\s{0,8}(?:\\{0,8}["'])?)([A-Za-z0-9+/]{8,}={0,2})"""
)
# Percent-encoded, once or more often: `password%3D…`, `%3A%2F%2Fuser%3Apassword%40`.
_PERCENT = r"%(?:25){0,4}"
_ENCODED = re.compile(
    rf"""(?ix) ((?:{_SECRET_WORD}(?!s(?![a-z])|iz|s?_(?:env|file|name|key\b))|(?<=26|3F|.[?&])(?:sig|signature))
        [\w.-]{{0,64}}+ (?:{_PERCENT}2[27])? (?:\+|{_PERCENT}20){{0,4}} {_PERCENT}3[AD] (?:\+|{_PERCENT}2[027]){{0,4}})
        (?:[^\s"'&;<>%]|%(?!(?:25){{0,4}}(?:0[AD]|2[0267C]|3[BCE]))[0-9A-F]{{2}}){{6,}}"""
)
_ENCODED_USERINFO = re.compile(
    rf"""(?ix) ((?::|{_PERCENT}3A)(?:/|{_PERCENT}2F){{2}})
        (?:[\w.~+-]|%(?!(?:25){{0,4}}(?:2F|3A|40))[0-9A-F]{{2}}){{0,128}}
        (?::|{_PERCENT}3A) (?:[^\s"'<>:/@?\#%]|%(?!(?:25){{0,4}}(?:2F|40))[0-9A-F]{{2}}){{1,512}} (?:@|{_PERCENT}40)"""
)
# Some of detect-secrets' patterns try every division of a run of blanks in three.
_BLANKS = re.compile(r"(\s{8,})")
_BEARER = re.compile(r"(?i)\b(bearer\s+)(?=[\w.~+/-]*[\d._])[\w.~+/-]{8,}=*")
_BASIC = re.compile(r"(?i)\b(basic\s+)([A-Za-z0-9+/]{8,}={0,2})")
_BLOCK = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:(?:(?!-----BEGIN).)*?-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:(?:\\[nr]|[\s+|>-]){0,40}[A-Za-z0-9+/=]{16,200})*)",
    re.DOTALL,
)
_BODY_LINE = re.compile(
    r"(?<![A-Za-z0-9/])(?=[A-Z0-9+/]{0,75}[a-z])(?=[a-z0-9+/]{0,75}[A-Z])(?=[A-Za-z+/]{0,75}\d)"
    r"[A-Za-z0-9+/]{60,76}(?![A-Za-z0-9+/])={0,2}"
)
# Assignments. Code that only names such a thing (`token = read()`, `max_tokens: 4096`, `api_key_env: NAME`) is none.
_QUOTED = re.compile(
    rf"""(?ix) ({_SECRET_WORD}(?!s?_(?:env|file|name|key\b)|iz)[\w-]{{0,64}}+ (?<!_env)(?<!_file) ["']?\s*
        (?:[=:]|=>|:=)\s*[rbf]?) (?:"(?!\s*")[^"\n]{{4,}}"|'(?!\s*')[^'\n]{{4,}}')"""
)
_VARIABLE = re.compile(
    r"""(?x) \b((?:[A-Z0-9]+_){0,16}(?:SECRET|TOKEN|PASSW(?:OR)?D|PASSPHRASE|PWD|CREDENTIAL|API_?KEY|ACCESS_?KEY
        |ACCOUNT_?KEY|PRIVATE_?KEY|AUTH)S?(?:_[A-Z0-9]+){0,16}(?<!_FILE)(?<!_ENV) \s*[=:]\s*)
        (?![\w.]+[(\[])[^\s"'{}()][^\n"']{3,}"""
)
_WHOLE_LINE = re.compile(
    rf"""(?imx) ^([ +-]?[ \t]*(?:-[ ])? (?:export[ ]+)?
        [\w.-]{{0,128}}{_SECRET_WORD}(?!s|iz)[\w-]{{0,64}}+(?<!_env)(?<!_file)
        [ \t]*+[:=][ \t]*+) (?![\w.]*[(\[])(?=[^\n]*[\d@!$%^&*\#]|[^\s]{{6,}}[ \t]*$)
        [^\s"'(){{}}\[\],;][^\n"'(){{}}\[\]]{{5,}}$"""
)
# Quotes that a text in a text has: `"{\"password\": \"…\"}"`; and elements of XML.
_ESCAPED = re.compile(
    rf"""(?ix) ({_SECRET_WORD}(?!s?_(?:env|file|name|key\b)|iz)[\w-]{{0,64}}+
        \\{{1,8}}["']\s{{0,8}}[:=]\s{{0,8}}\\{{1,8}}["']) [^"'\\\n]{{4,}}"""
)
_ELEMENT = re.compile(rf"(?i)(<[\w:.-]{{0,64}}{_SECRET_WORD}[\w-]{{0,64}}>)[^<>\n]{{4,}}(?=</)")
# A text of YAML below its key, and what is before the colon.
_FOLDED = re.compile(r"(:[ \t]{0,8}[|>][+-]?[ \t]{0,8}\n[ +]?[ \t]{1,40})[^\n]+")
_ENDS_IN_NAME = re.compile(rf"(?i){_SECRET_WORD}[\w-]{{0,64}}[ \t]{{0,8}}\Z")
_NAME_CHARS = 128
_ASSIGNED = re.compile(
    rf"""(?ix) ({_SECRET_WORD}(?!s\b|iz|s?_(?:env|file|name|key)\b)[\w-]{{0,64}}+(?<!_env)(?<!_file)
        ["']?\s*(?:[=:\uff1a]|=>)\s*["']?(?:bearer\s+)?)
        [^\s"',;(){{}}\[\]]{{6,}}(?![\w.(\[])"""
)


# The sign of an assignment: a name that speaks of a secret, and behind it what assigns.
_TO_ITS_VALUE = r"[\w-]{0,64}+[\\\"'\s]*+[=:>\uff1a]"
_ASSIGNS = rf"{_WORDS}{_TO_ITS_VALUE}"
# Letters that are an "i" or an "s" to a pattern that ignores case, and to `str.lower` are not.
_LIKE_ASCII = {"\u0130": "i", "\u0131": "i", "\u017f": "s"}
_LONG_RUN = re.compile("[A-Za-z0-9+/]{60}")
# Bytes to `a` where such a run may be, which finds one in a fiftieth of the time.
_TO_RUNS = bytes(ord("a" if re.match("[A-Za-z0-9+/]", chr(byte)) else " ") for byte in range(256))
_RUN = b"a" * 60
# Where `str.splitlines` ends a line.
_LINE_ENDS = "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_NETRC_SIGN = re.compile(r"machine[ \t]{1,40}\S{1,255}\s{1,40}(?:login|user|account|passw)|default\s{1,40}login")


class Form(NamedTuple):
    """One form of secrets: a line without its sign holds none of it, so that most lines are only looked at.

    Attributes:
        hide: a line to the line with `(hidden)` in place of the secret.
        lowered: what a line in small letters holds, if it holds one; None where capitals tell.
        cased: what the line as it is may hold instead.
    """

    hide: Callable[[str], str]
    lowered: re.Pattern[str] | None
    cased: re.Pattern[str] | None

    def may_be_in(self, line: str, lowered: str) -> bool:
        """Whether the line holds one of the signs."""
        return bool((self.lowered and self.lowered.search(lowered)) or (self.cased and self.cased.search(line)))


def _form(hide: Callable[[str], str], lowered: str | None = None, cased: str | None = None) -> Form:
    return Form(hide, re.compile(lowered) if lowered else None, re.compile(cased) if cased else None)


def _all_but(pattern: re.Pattern[str]) -> Callable[[str], str]:
    """Hides what a pattern matches, but for its first group."""
    return partial(pattern.sub, rf"\1{HIDDEN}")


def _hide_login(match: re.Match[str]) -> str:
    try:
        is_login = b":" in base64.b64decode(match[2] + "=" * (-len(match[2]) % 4), validate=True)
    except (binascii.Error, ValueError):
        is_login = False
    return f"{match[1]}{HIDDEN}" if is_login else match[0]


def _hide_known_shapes(line: str) -> str:
    return "".join(map(_without_known_shapes, _BLANKS.split(line)))


def _without_known_shapes(text: str) -> str:
    for shape in known_shapes():
        text = shape.sub(HIDDEN, text)
    return text


@lru_cache(maxsize=1)
def known_shapes() -> tuple[re.Pattern[str], ...]:
    """The patterns of detect-secrets; its import takes some 0.3 s."""
    package = "detect_secrets.plugins"
    detectors = (getattr(importlib.import_module(f"{package}.{module}"), name) for module, name in _DETECTORS.items())
    return tuple(pattern for detector in detectors for pattern in detector.denylist)


# In the order in which they are hidden.
FORMS = (
    _form(partial(USERINFO.sub, f"{HIDDEN}@"), "@"),
    _form(partial(_ENCODED_USERINFO.sub, rf"\1{HIDDEN}@"), rf"@|{_PERCENT}40"),
    _form(_all_but(_QUERY), r"(?:sig|signature|credential|token|secret|passw(?:or)?d|pwd|key|keyid|accessid)="),
    _form(
        partial(_HEADER.sub, rf"\1\2{HIDDEN}"),
        r"(?:authorization|cookie|x-[\w-]{0,64}(?:key|token|signature))[\"'\s]*+[:=]",
    ),
    _form(_all_but(_BEARER), r"bearer\s"),
    _form(partial(_BASIC.sub, _hide_login), r"basic\s"),
    _form(
        partial(_SHAPED.sub, HIDDEN),
        cased=r"yJ[\w=-]{8}|f_\w{20}|-(?<=sk-)[\w-]{20}|T3BlbkFJ|github_pat_|gh[pousr]_\w{20}|pm_\w{20}",
    ),
    _form(
        _hide_known_shapes,
        r"(?:key|pwd?|pass(?:word)?|token)[\"']?\]?[ =:>]{1,20}+[\"']?[\w-]{44}"
        r"|cl(?:ou|oudant)?[_-]?(?:api)?(?:key|pwd?|pass(?:word)?|token)[\"']?\]?[ =:>]{1,20}+[\"']?[a-z]{24}"
        r"|aws.{0,20}?(?:key|pw|pass|token)|xox[abposr]-\d|hooks\.slack\.com/|api.softlayer.com/"
        r"|https?://[\w-]{1,255}:[0-9a-z]{24,64}@",
        r"AKC[a-zA-Z0-9]{10}|AP[\dA-F][a-zA-Z0-9]{8}|A(?:3T[A-Z0-9]|BIA|CCA|KIA|SIA)[0-9A-Z]{16}|AccountKey="
        r"|\.[a-zA-Z\d_-]{6}\.[a-zA-Z\d_-]{27}|gh[pousr]_\w{20}"
        r"|gl(?:pat|dt|ft|soat|rt|cbt|imt|ptt|agent|oas)-[\w-]{20}|GR1348941|-us\d|pypi-AgE|SG\.[\w-]{22}\."
        r"|q0csp-|k_live_|:[0-9A-Za-z_-]{35}|AC[a-z0-9]{32}|SK[a-z0-9]{32}",
    ),
    _form(_all_but(_WRAPPED), r"secret(?:str|bytes)\("),
    _form(partial(_AUTH.sub, _hide_login), r"auth[\\\"'\s]*+[:=]"),
    _form(_all_but(_OPTION), r"-(?:(?:token|password|passwd|secret|api-key|access-key)[ ]|u(?:ser)?[ =]|-user[ =])"),
    _form(_all_but(_ATTACHED), "mysql|mariadb|sshpass"),
    _form(_all_but(_PGPASS), r":(?:\d{1,5}|\*):(?:\*|[a-z_])"),
    _form(_all_but(_ENCODED), rf"{_PERCENT}3[ad]"),
    _form(partial(_QUOTED.sub, lambda match: f'{match[1]}"{HIDDEN}"'), _ASSIGNS),
    _form(_all_but(_ESCAPED), rf"{_WORDS}[\w-]{{0,64}}+\\"),
    _form(_all_but(_ELEMENT), rf"{_WORDS}[\w-]{{0,64}}+>"),
    _form(
        _all_but(_VARIABLE),
        cased="SECRET|TOKEN|PASS|PWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY|PRIVATE_?KEY|AUTH",
    ),
    _form(_all_but(_WHOLE_LINE), _ASSIGNS),
    _form(_all_but(_ASSIGNED), _ASSIGNS),
    _form(partial(_BODY_LINE.sub, HIDDEN), cased=_LONG_RUN.pattern),
)
# How the signs begin, or what they cannot be without: each by a certain letter, so that a text is gone through quickly.
_ANY_LOWERED = re.compile(
    r"secret|token|pass|pw|credential|key|sig|accessid=|kennwort|contrase|mot|senha|wachtwoord|пароль|密|auth|cookie"
    r"|bearer\s|basic\s|mysql|mariadb|sshpass|@|%|-u|xox[abposr]-|hooks\.slack|api.softlayer|:(?:\d{1,5}|\*):[*a-z_]"
)
_ANY_CASED = re.compile("|".join(form.cased.pattern for form in FORMS[:-1] if form.cased))


def hide_over_lines(text: str) -> str:
    """A text without the secrets that stand on several lines, or on another line than their name."""
    if "-----BEGIN" in text:
        text = _BLOCK.sub(HIDDEN, text)
    text = _FOLDED.sub(_hide_folded, text)
    return _hide_logins(text)


def _hide_logins(text: str) -> str:
    """As in a file of netrc; looked for where it may begin, since such a text has any number of lines."""
    low = lowered(text)
    pieces, at, look = [], 0, 0
    while sign := _NETRC_SIGN.search(low, look):
        login = _NETRC.match(text, sign.start())
        look = sign.start() + 1
        if login:
            pieces += [text[at : login.end(1)], HIDDEN]
            at = look = login.end()
    return "".join([*pieces, text[at:]])


def _hide_folded(match: re.Match[str]) -> str:
    named = _ENDS_IN_NAME.search(match.string, max(match.start() - _NAME_CHARS, 0), match.start())
    return f"{match[1]}{HIDDEN}" if named else match[0]


def hide_in_lines(text: str) -> str:
    """A text without the secrets that stand on one line."""
    low = lowered(text)
    pieces, at = [], 0
    for start, end in _lines_with_signs(text, low):
        lines, lows = text[start:end].splitlines(keepends=True), low[start:end].splitlines(keepends=True)
        pieces += [text[at:start], *map(_hide_in_line, lines, lows)]
        at = end
    return "".join([*pieces, text[at:]])


def _lines_with_signs(text: str, low: str) -> list[tuple[int, int]]:
    """Where lines begin and end that may hold a secret; in all others, nobody looks twice."""
    found = set()
    looks = [(_ANY_LOWERED, low), (_ANY_CASED, text)]
    if _RUN in text.encode(errors="replace").translate(_TO_RUNS):
        looks.append((_LONG_RUN, text))
    for signs, where in looks:
        end = 0
        while sign := signs.search(where, end):
            start = where.rfind("\n", end, sign.start()) + 1 or end
            end = where.find("\n", sign.start()) + 1 or len(where)
            found.add((start, end))
    return sorted(found)


def _hide_in_line(line: str, low: str) -> str:
    hidden = line.rstrip(_LINE_ENDS)
    end = line[len(hidden) :]
    for form in FORMS:
        if form.may_be_in(line, low):
            hidden = form.hide(hidden)
    return hidden + end


def lowered(text: str) -> str:
    """A text in small letters, character for character as patterns that ignore case read it."""
    if not text.isascii():
        for other, letter in _LIKE_ASCII.items():
            text = text.replace(other, letter)
    return text.lower()
