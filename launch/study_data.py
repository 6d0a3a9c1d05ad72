"""python -m launch.study_data --xquad=DIR --ntrex=DIR --flores=DIR --out=OUT [--languages=ar,el,th]

The data of docs/study.md, from what their authors publish:

- XQuAD by halves of its articles (`launch/xquad.py`): OUT/LANGUAGE.jsonl and OUT/test/xquad.LANGUAGE.json;
- NTREX-128, 1,997 sentences to train translation on: OUT/ntrex.LANGUAGE.tsv, with columns en and LANGUAGE;
- FLORES-200's devtest: its first 200 sentences as plain text, OUT/flores.LANGUAGE.tsv, and all of them to
  translate, OUT/test/*.devtest.
"""

import argparse
import csv
import shutil
from pathlib import Path

from launch import xquad
from prom_jax.data.languages import find_code

PLAIN = 200  # sentences of FLORES whose perplexity is measured


def main(argv=None):
    """Reads the command line and writes the files."""
    parser = argparse.ArgumentParser("python -m launch.study_data", description=__doc__.split("\n\n")[1])
    parser.add_argument("--xquad", type=Path, required=True, help="folder with xquad.LANGUAGE.json")
    parser.add_argument("--ntrex", type=Path, required=True, help="folder with newstest2019-ref.CODE.txt")
    parser.add_argument("--flores", type=Path, required=True, help="folder with CODE_SCRIPT.devtest")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--languages", default="ar,el,th", help="codes, separated by commas")
    arguments = parser.parse_args(argv)
    out, flores = arguments.out, arguments.flores
    xquad.main([str(arguments.xquad), str(out), f"--languages={arguments.languages}"])
    codes = sorted(path.stem for path in flores.glob("*.devtest"))
    for language in arguments.languages.split(","):
        code = find_code(language, codes)
        reference = arguments.ntrex / f"newstest2019-ref.{code.partition('_')[0]}.txt"
        write_pairs(
            out / f"ntrex.{language}.tsv", language, arguments.ntrex / "newstest2019-src.eng.txt", reference
        )
        sides = [flores / f"{name}.devtest" for name in ("eng_Latn", code)]
        write_pairs(out / f"flores.{language}.tsv", language, *sides, most=PLAIN)
        for side in sides:
            shutil.copy(side, out / "test" / side.name)


def write_pairs(path: Path, language: str, english: Path, target: Path, most: int | None = None) -> None:
    """Writes two aligned text files as one table, the first `most` lines of them."""
    sides = [side.read_text(encoding="utf-8").rstrip("\n").split("\n") for side in (english, target)]
    rows = [("en", language), *zip(*sides, strict=True)][: most and most + 1]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
