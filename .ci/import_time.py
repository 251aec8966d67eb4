"Says how long the package takes to import, and fails when the package alone brings PyTorch along. No time is a failure: machines differ."

import subprocess
import sys
import time

PROGRAMS = {
    "python alone": "pass",
    "import tokenflow_nb": "import sys, tokenflow_nb; assert 'torch' not in sys.modules, 'tokenflow_nb imports torch'",
    "from tokenflow_nb.edit import edit_video": "from tokenflow_nb.edit import edit_video",
    "from tokenflow_nb.panels import EditPanel": "from tokenflow_nb.panels import EditPanel",
}


def main() -> int:
    for said, program in PROGRAMS.items():
        times = []
        for _ in range(3):
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
            times.append(time.perf_counter() - began)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
        print(f"{said:44} {min(times):.2f} s, the best of 3")
    return 0


if __name__ == "__main__":
    sys.exit(main())
