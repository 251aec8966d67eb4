"Says how long the package takes to import, and fails when the package alone brings PyTorch along. No time is a failure: machines differ."

import os
import subprocess
import sys

PROGRAMS = {
    "python alone": "pass",
    "import tokenflow_nb": "import sys, tokenflow_nb; assert 'torch' not in sys.modules, 'tokenflow_nb imports torch'",
    "from tokenflow_nb.edit import edit_video": "from tokenflow_nb.edit import edit_video",
    "from tokenflow_nb.panels import EditPanel": "from tokenflow_nb.panels import EditPanel",
}


def cpu() -> float:
    "Seconds of processor time that all programs took that were started here; a busy machine does not change them much."
    times = os.times()
    return times.children_user + times.children_system


def main() -> int:
    for said, program in PROGRAMS.items():
        times = []
        for _ in range(3):
            began = cpu()
            done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
            times.append(cpu() - began)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
        print(f"{said:44} {min(times):.2f} s of processor time, the best of 3")
    return 0


if __name__ == "__main__":
    sys.exit(main())
