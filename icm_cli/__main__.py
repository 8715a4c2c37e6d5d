"""The ``icm`` script, also ``python -m icm_cli``."""

import sys


def main() -> None:
    """Run the script. A Ctrl-C during the imports is reported in one line."""
    try:
        from icm_cli.cli import main as run

        run()
    except KeyboardInterrupt:
        print("icm: interrupted before the command began", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
