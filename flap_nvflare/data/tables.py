"""Tables of cases: CSV files with a header line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from flap_nvflare.data.cases import stay_within
from flap_nvflare.data.errors import DataError


def read_rows(table: Path, columns: Sequence[str], mend: str) -> list[tuple[int, tuple[str, ...]]]:
    """Line numbers with the values of the columns, blanks around them taken off.

    Args:
        table: the CSV file; other columns may stand in it.
        columns: names of those that are read.
        mend: what to do if the file is missing.

    Raises:
        DataError: if the file or a column is missing, it is no CSV table, or a link leads out of
            its folder.
    """
    if not table.is_file():
        raise DataError(f"{table}: missing; {mend}")
    stay_within(table.parent, table)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            missing = [name for name in columns if name not in header]
            if missing:
                raise DataError(
                    f"{table}: no column {missing}; its first line names {header}, which must be "
                    f"separated by commas"
                )
            reader.fieldnames = header
            rows = []
            for row in reader:
                values = tuple((row[name] or "").strip() for name in columns)
                rows.append((reader.line_num, values))
            return rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as a CSV table: {error}") from error
