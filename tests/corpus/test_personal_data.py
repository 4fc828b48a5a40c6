"""Personal data against a list: what is found, kept and missed."""

import random
import time

import pytest

from r1hpc.corpus.clean import text as pii

_LINES = ("MIIEpAIBAAKCAQEA" * 4 + "\n") * 3
_AWS_SECRET = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
FOUND = [
    ("EMAIL", "jane.doe+tag@mail.example.co.uk"),
    ("EMAIL", "o'neil_99@example.org"),
    ("IP", "8.8.8.8"),
    ("IP", "2001:4860:4860::8888"),
    ("PHONE", "+49 30 901820"),
    ("PHONE", "+1 (212) 555-0199"),
    ("PHONE", "(212) 555-0199"),
    ("PHONE", "212-555-0199"),
    ("PHONE", "+44 20 7946 0958"),
    ("CARD", "4111 1111 1111 1111"),
    ("CARD", "5500-0000-0000-0004"),
    ("CARD", "378282246310005"),
    ("IBAN", "DE89 3704 0044 0532 0130 00"),
    ("IBAN", "GB29NWBK60161331926819"),
    ("SSN", "078-05-1120"),
    ("AWS_KEY", "AKIAIOSFODNN7EXAMPLE"),
    ("AWS_KEY", "ASIAIOSFODNN7EXAMPLE"),
    *(("GITHUB_TOKEN", f"{kind}_{'a1B2' * 9}") for kind in ("ghp", "gho", "ghs", "ghu", "ghr")),
    ("GITHUB_TOKEN", f"github_pat_{'a1B2' * 5}_{'c3D4' * 14}"),
    ("HF_TOKEN", f"hf_{'aB3' * 11}"),
    ("HF_TOKEN", f"hf_{'aBcD' * 8}xY"),
    ("API_KEY", f"sk-{'a1b2' * 8}"),
    ("API_KEY", f"sk-proj-{'aB3_' * 12}x"),
    ("GITLAB_TOKEN", f"glpat-{'aB3x' * 5}"),
    ("SLACK_TOKEN", f"xoxb-123456789012-{'aB3' * 8}"),
    ("GOOGLE_KEY", f"AIza{'aB3_x' * 7}"),
    ("JWT", f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{'aB3' * 14}"),
    ("PRIVATE_KEY", f"-----BEGIN RSA PRIVATE KEY-----\n{_LINES}-----END RSA PRIVATE KEY-----"),
    ("PRIVATE_KEY", f"-----BEGIN PRIVATE KEY-----\n{_LINES}-----END PRIVATE KEY-----"),
    (
        "PRIVATE_KEY",
        "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0A1B\n\n"
        f"{_LINES}-----END EC PRIVATE KEY-----",
    ),
    ("PRIVATE_KEY", f"-----BEGIN OPENSSH PRIVATE KEY-----\n{_LINES.rstrip()}"),
]
KEPT = [
    "127.0.0.1",
    "192.168.0.17",
    "at 10:30:45",
    "4111 1111 1111 1112",
    "DE00 3704 0044 0532 0130 00",
    "000-12-3456",
    "ISBN 978-3-16-148410-0",
    "1234567890",
    "2024-11-26",
    "user@localhost",
    "std::vector<int>",
    "3.14159265358979",
    "1,000,000 of 2,000,000",
    "pages 100-200-300",
    "ASIAPACIFICTRADEFORUM",
    "sk-learn-contrib-packages-2024",
    "sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "hf_model_loading_and_saving_utilities",
    "hf_transformersmodelloading",
    "xoxo-hugs-and-kisses-to-all-1999",
    "glpat-personal-access-token",
    "AIzaTooShort123",
    f"AIza{'aB3_x' * 9}",
    "commit da39a3ee5e6b4b0d3255bfef95601890afd80709",
    _AWS_SECRET,  # 40 characters may be anything, without a name before them
    "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQ\n-----END PUBLIC KEY-----",
]
MISSED = [
    "030 901820",
    "jane dot doe at example dot org",
    "12 Main Street, Springfield",
    "Jane Doe",
    "jane@exämple.org",
]
"""What the patterns do not find, so that nobody believes they do."""


@pytest.mark.parametrize(("kind", "value"), FOUND)
@pytest.mark.parametrize("around", ["{}", "Call {} now.", "({})", "a,{},b", "at {}."])
def test_personal_data_is_masked(kind: str, value: str, around: str) -> None:
    masked, count = pii.mask(around.format(value))
    assert count == 1
    # An apostrophe ends a word: of o'neil@... the o stays, as in most such patterns.
    assert masked == around.format(f"o'<{kind}>" if value.startswith("o'") else f"<{kind}>")


@pytest.mark.parametrize("text", KEPT)
def test_what_only_looks_like_it_is_kept(text: str) -> None:
    assert pii.mask(f"It says {text} here.") == (f"It says {text} here.", 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4111 1111 1111 1111 12/27 123", "<CARD> 12/27 123"),
        ("Visa 4111111111111111 123", "Visa <CARD> 123"),
        ("2023 4111 1111 1111 1111", "2023 <CARD>"),
        ("2023 4111 1111 1111 1111 12/27 123", "2023 <CARD> 12/27 123"),
        ("4111 1111 1111 1111 5500 0000 0000 0004", "<CARD> <CARD>"),
        ("3782 822463 10005 1234", "<CARD> 1234"),
        ("IBAN ES91 2100 0418 4502 0005 1332 BIC CAIXESBB", "IBAN <IBAN> BIC CAIXESBB"),
        ("DE89 3704 0044 0532 0130 00 DE89 3704 0044 0532 0130 00", "<IBAN> <IBAN>"),
    ],
)
def test_a_number_beside_it_hides_nothing(text: str, expected: str) -> None:
    assert pii.mask(text)[0] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("aws_secret_access_key = {}\n", "aws_secret_access_key = <AWS_SECRET>\n"),
        ("export AWS_SECRET_ACCESS_KEY='{}'", "export AWS_SECRET_ACCESS_KEY='<AWS_SECRET>'"),
        ('{{"SecretAccessKey": "{}"}}', '{{"SecretAccessKey": "<AWS_SECRET>"}}'),
        ("AKIAIOSFODNN7EXAMPLE,{}", "<AWS_KEY>,<AWS_SECRET>"),
    ],
)
def test_the_secret_beside_an_aws_key(text: str, expected: str) -> None:
    assert pii.mask(text.format(_AWS_SECRET))[0] == expected.replace("{{", "{").replace("}}", "}")


def test_only_the_key_is_masked_where_its_end_is_missing() -> None:
    text = f"-----BEGIN PRIVATE KEY-----\n{_LINES}It goes on here."
    assert pii.mask(text) == ("<PRIVATE_KEY>\nIt goes on here.", 1)
    assert pii.mask("-----BEGIN PRIVATE KEY----- is how one begins.")[0] == "<PRIVATE_KEY> is how one begins."


@pytest.mark.parametrize(
    "part",
    [
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN AAAA ",
        f"-----BEGIN PRIVATE KEY-----\n{'A' * 30}\n",
        "-----BEGIN PRIVATE KEY------a",
        "secret access key  ",
        "AKIAAKIAAKIAAKIA1234,",
        "github_pat_",
        "eyJaaaaaa-",
        "eyJaaaaaa.",
        "sk-xoxb-glpat-",
    ],
)
def test_secrets_are_looked_for_in_linear_time(part: str) -> None:
    """Quadratic, these would take minutes."""
    text = part * (1_000_000 // len(part))
    begun = time.process_time()
    pii.mask(text)
    assert time.process_time() - begun < 60


def test_plain_numbers_seldom_pass_for_cards() -> None:
    draw = random.Random(0)
    tables = [" ".join(str(draw.randrange(1000, 10_000)) for _ in range(8)) for _ in range(300)]
    years = " ".join(map(str, range(1990, 2030)))
    assert pii.mask(years) == (years, 0)
    assert sum(pii.mask(table)[1] > 0 for table in tables) < 100
    assert sum(pii.mask(table.replace(" ", ""))[1] for table in tables) == 0


def test_a_version_of_four_numbers_is_a_known_false_alarm() -> None:
    assert pii.mask("version 1.2.3.4") == ("version <IP>", 1)


@pytest.mark.parametrize("text", MISSED)
def test_what_is_known_to_be_missed(text: str) -> None:
    assert pii.mask(text)[1] == 0
