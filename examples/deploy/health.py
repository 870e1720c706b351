"""The health check of both images: it fails unless /health of the server answers well.

python3 health.py /proc/1/cmdline    the server's arguments, which may name another port
"""

import argparse
import sys
from pathlib import Path
from urllib.request import urlopen

PORT = 8000  # vLLM's, when nothing else is said.
TIMEOUT_SECONDS = 4


def port_of(arguments: list[str]) -> int:
    """The port of `vllm serve` with these arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--port", type=int, default=PORT)
    return int(parser.parse_known_args(arguments)[0].port)


if __name__ == "__main__":
    arguments = Path(sys.argv[1]).read_text().split("\0")
    urlopen(f"http://127.0.0.1:{port_of(arguments)}/health", timeout=TIMEOUT_SECONDS)
