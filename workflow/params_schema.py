"""Keep params.schema.yaml, which is for editors, equal to the classes that check params.yaml.

python workflow/params_schema.py --check    # exit status 1 when the file differs
python workflow/params_schema.py --write    # write it
"""

import argparse
import sys
from pathlib import Path

import yaml

from llmpress.pipeline.schema import params_schema

FILE = Path(__file__).parent / "schemas" / "params.schema.yaml"
HEADER = "# Written by python workflow/params_schema.py --write\n"


def text() -> str:
    """Return what the file must hold."""
    return HEADER + yaml.safe_dump(params_schema(), sort_keys=False, width=100)


def main() -> int:
    """Check or write the schema and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="only tell whether the file is right")
    what.add_argument("--write", action="store_true", help="write the file")
    if parser.parse_args().write:
        FILE.write_text(text(), encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != text():
        print(f"{FILE.name} differs: run python workflow/params_schema.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
