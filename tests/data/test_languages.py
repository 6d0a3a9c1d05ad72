import pytest

from prom_jax.data.languages import find_code
from prom_jax.utils.errors import UserError

FLORES = "ace_Arab arb_Arab ary_Arab bod_Tibt eng_Latn est_Latn kor_Hang lvs_Latn npi_Deva pes_Arab".split()
FLORES += "prs_Arab swh_Latn tha_Thai zho_Hans zho_Hant".split()
NTREX = "arb aze-Latn kmr kor nep por-BR por srp-Cyrl srp-Latn swa tha zho-CN zho-TW".split()


@pytest.mark.parametrize(
    "language, code",
    [
        ("th", "tha_Thai"),
        ("sw", "swh_Latn"),
        ("ar", "arb_Arab"),
        ("fa", "pes_Arab"),
        ("ne", "npi_Deva"),
        ("et", "est_Latn"),
        ("lv", "lvs_Latn"),
        ("ko", "kor_Hang"),
        ("zh", "zho_Hans"),
        ("zh-TW", "zho_Hant"),
    ],
)
def test_codes_of_flores(language, code):
    assert find_code(language, FLORES) == code


@pytest.mark.parametrize(
    "language, code",
    [
        ("th", "tha"),
        ("sw", "swa"),
        ("ar", "arb"),
        ("az", "aze-Latn"),
        ("ko", "kor"),
        ("ne", "nep"),
        ("pt", "por"),
        ("sr", "srp-Cyrl"),
        ("sr-Latn", "srp-Latn"),
        ("zh", "zho-CN"),
        ("zh-TW", "zho-TW"),
    ],
)
def test_codes_of_ntrex(language, code):
    assert find_code(language, NTREX) == code


def test_a_language_that_is_not_there():
    with pytest.raises(UserError, match="no language 'eo' in script Latn"):
        find_code("eo", FLORES)
