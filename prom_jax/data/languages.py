"""Codes of languages as others write them."""

import langcodes

from prom_jax.data.translation.checks import script
from prom_jax.utils.errors import UserError


def find_code(language: str, codes: list[str]) -> str:
    """The code among `codes` (``tha_Thai``, ``tha``) of a language (``th``) in its likely script, one
    without a region where there are several.

    Raises:
      UserError: there is none.
    """
    wanted, its_script = langcodes.Language.get(language).language, script(language)
    for code in sorted(codes, key=lambda code: bool(langcodes.Language.get(code).territory)):
        found = {"Hang": "Kore"}.get(script(code), script(code))  # Korean is Hangul, with or without Han
        name = code.replace("-", "_").partition("_")[0]
        if found == its_script and langcodes.Language.get(name).prefer_macrolanguage().language == wanted:
            return code
    raise UserError(
        f"There is no language '{language}' in script {its_script} among the {len(codes)} that are known "
        "there."
    )
