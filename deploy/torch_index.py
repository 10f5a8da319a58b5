"""Print pip's arguments that get torch as a CPU build, on a machine that has no GPU and reaches PyTorch's CPU index."""

import shutil
import urllib.error
import urllib.request

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    if shutil.which("nvidia-smi"):
        return
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=5):
            print(f"--extra-index-url {CPU_INDEX}")
    except (urllib.error.URLError, TimeoutError):
        return


if __name__ == "__main__":
    main()
