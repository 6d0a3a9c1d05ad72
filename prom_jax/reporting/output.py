"""The report as files: Markdown, CSV, and one page of HTML that needs nothing else."""

import base64
import csv
import io
import shutil
from pathlib import Path

import jinja2

from prom_jax.reporting.comparisons import LEVEL
from prom_jax.reporting.figures import Figure
from prom_jax.reporting.runs import Run, finite
from prom_jax.reporting.tables import Cell, Column, Section, Table, Value
from prom_jax.utils.errors import UserError
from prom_jax.utils.workdir import make_directory, write_text

TEMPLATES = Path(__file__).parents[1] / "resources" / "report"
# By place among a table's references: significantly better, significantly worse.
MARKS = (("▲", "▼"), ("△", "▽"))
MISSING = "–"


def write(
    out: Path, sections: list[Section], runs: list[Run], figures: list[Figure], notes: list[str], paper: dict
):
    """Writes report.md, report.html, tables/*.csv and figures/*.png.

    Raises:
      UserError: if something cannot be written.
    """
    make_directory(out)
    pictures = [
        copy(figure, out / "figures" / f"{n}-{figure.path.name}") for n, figure in enumerate(figures, 1)
    ]
    content = {
        "sections": sections,
        "runs": runs,
        "measurements": measurements(runs),
        "figures": list(zip(figures, pictures)),
        "notes": notes,
        "paper": paper,
    }
    for name, table in csv_tables(sections, runs).items():
        write_text(out / "tables" / f"{name}.csv", as_csv(table))
    write_text(out / "report.md", render("report.md.jinja", content))
    write_text(out / "report.html", render("report.html.jinja", content))


def render(name: str, content: dict) -> str:
    """A template filled in; whatever comes from outside is escaped, in HTML as in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals |= {
        "marks": marks,
        "few": few,
        "seeds": seeds,
        "symbols": MARKS,
        "missing": MISSING,
        "level": LEVEL,
    }
    environment.filters |= {"md": as_markdown_text, "data_uri": data_uri, "p": p_value, "signed": signed}
    environment.filters |= {"number": number, "cell": markdown_cell}
    return environment.get_template(name).render(content)


def copy(figure: Figure, destination: Path) -> str:
    """Copies a picture into the report's folder; returns its path from there."""
    make_directory(destination.parent)
    try:
        shutil.copyfile(figure.path, destination)
    except OSError as error:
        raise UserError(
            f"{figure.path} cannot be copied to {destination} ({error.strerror}): free some space, or give "
            "another --out"
        ) from error
    return f"{destination.parent.name}/{destination.name}"


def data_uri(path: Path) -> str:
    """A PNG as an address that holds the picture itself."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


# Numbers and marks.


def number(value: float | None, digits: int = 1) -> str:
    """Such as '10.7', or a dash."""
    return MISSING if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """Such as '+2.1' or '−0.4'."""
    return "" if value is None else f"{value:+.1f}".replace("-", "−")


def p_value(value: float | None) -> str:
    """Such as '0.013' or '<0.001'."""
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def marks(table: Table, value: Value) -> list[tuple[str, str]]:
    """What a value's significant differences look like, and what they say."""
    return [
        (MARKS[place][verdict < 0], f"significantly {'better' if verdict > 0 else 'worse'} than {name}")
        for place, (reference, name) in enumerate(table.references.items())
        if (verdict := value.verdicts.get(reference))
    ]


def seeds(cells: list[Cell]) -> str:
    """How many seeds the cells of a row are means of, where that is more than one."""
    numbers = sorted({cell.seeds for cell in cells if cell.seeds})
    return (
        f"{'–'.join(str(n) for n in sorted({numbers[0], numbers[-1]}))} seeds" if numbers[-1:] > [1] else ""
    )


def few(column: Column, cell: Cell) -> str:
    """How many documents a cell has, if the column has more."""
    return f"n = {cell.documents}" if 0 < cell.documents < column.documents else ""


def markdown_cell(cell: Cell, table: Table, column: Column) -> str:
    """Such as '10.7 / 22.5▲ (3.4* / 16.8*)'."""
    ours = " / ".join(
        number(value.ours, table.digits)
        + (f" ± {value.spread:.1f}" if value.spread is not None else "")
        + "".join(mark for mark, _ in marks(table, value)) * (not cell.borrowed)
        for value in cell.values
    )
    paper = " / ".join(number(value.paper, table.digits) for value in cell.values)
    some = any(value.paper is not None for value in cell.values)
    flags = "\\*" * cell.zeroed + "=" * cell.borrowed
    of_paper = f" ({paper}{chr(92) + '*' if cell.paper_zeroed else ''})" * some
    return f"{ours}{flags}{of_paper}{', ' * bool(few(column, cell))}{few(column, cell)}"


def as_markdown_text(text) -> str:
    """Text that Markdown takes as it is."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join("\\" + letter if letter in "\\`*_[]|" else letter for letter in text)


# CSV.


def as_csv(rows: list[dict]) -> str:
    """Rows of the same keys, under a header."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0].keys() if rows else (), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def csv_tables(sections: list[Section], runs: list[Run]) -> dict[str, list[dict]]:
    """Rows by name of the file."""
    found = {"measurements": measurements(runs)}
    for section in sections:
        for table in section.tables:
            found.setdefault(table.key, []).extend(_values(section, table))
            found.setdefault("comparisons", []).extend(
                {"base_model": section.base, "table": table.key} | vars(comparison)
                for comparison in table.comparisons
            )
    return found


def _values(section: Section, table: Table):
    for row, cells in table.rows:
        for column, cell in zip(table.columns, cells):
            for metric, value in zip(column.metrics, cell.values):
                yield {
                    "base_model": section.base,
                    "row": row,
                    "column": column.label,
                    "metric": metric,
                    "ours": value.ours,
                    "spread": value.spread,
                    "seeds": cell.seeds,
                    "documents": cell.documents,
                    "paper": value.paper,
                    "zeroed": cell.zeroed,
                    "as_prom": cell.borrowed,
                    "significant": "; ".join(text for _, text in marks(table, value)),
                }


def measurements(runs: list[Run]) -> list[dict]:
    """Every score of every evaluation as results.json has it, with the standard error over documents."""
    return [
        {
            "folder": str(run.folder),
            "base_model": run.base,
            "method": run.method,
            "language": run.language,
            "seed": run.seed,
            "pivot": str(run.pivot or ""),
            "task": task,
            "metric": metric,
            "value": finite(entry["value"]),
            "stderr": finite(entry.get("stderr")),
            "documents": entry.get("n", content.get("n")),
        }
        for run in runs
        for task, content in run.tasks.items()
        for metric, entry in content["metrics"].items()
    ]
