"""Nothing is reported to anybody, and nothing is left outside the folders that a user names."""

import ast
import os
import subprocess
import sys

from PIL import Image

from metric_models import nudenet
from scripts import environment


# Records what is looked up or connected to, with what asked for it; onnxruntime does it past Python, and leaves files.
SCRIPT = """
import sys

asked = []
events = ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect")
sys.addaudithook(lambda event, args: asked.append(event) if event in events else None)

from diffusers_safe import cli
from diffusers_safe.metrics import make_metrics
from diffusers_safe.training.pictures import open_dataset

model, pictures, folder = sys.argv[1:]
cli.main(["generate", "--model", model, "--prompts", "a cat", "--num_inference_steps", "1", "--output_dir", folder])
make_metrics(["nudity"])
open_dataset(train_data_dir=pictures)
print([asked, "onnxruntime" in sys.modules])
"""


def run(tmp_path, model, **changes):
    """The script's last line, and the files and folders it left below HOME and TMPDIR."""
    homes = {name: tmp_path / name for name in ("HOME", "TMPDIR")}
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "metadata.csv").write_text("file_name,text\na.png,a cat\n")
    for folder in homes.values():
        folder.mkdir()
    ours = ("ORT_DISABLE_TELEMETRY", "HF_UPDATE_DOWNLOAD_COUNTS", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE")
    unset = {name: value for name, value in environment(**changes).items() if name not in ours or name in changes}
    places = {**homes, "HF_HOME": tmp_path / "cache", "XDG_CACHE_HOME": tmp_path / "HOME" / ".cache"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, tmp_path / "pictures", tmp_path / "out"],
        env={**unset, **{name: str(place) for name, place in places.items()}},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    left = {path.relative_to(tmp_path).as_posix() for folder in homes.values() for path in folder.rglob("*")}
    return ast.literal_eval(done.stdout.splitlines()[-1]), left


def test_nothing_is_looked_up_and_home_and_temporary_folder_stay_empty(tiny_model_folder, tmp_path):
    nudenet()  # brings onnxruntime
    (asked, imported), left = run(tmp_path, tiny_model_folder)
    assert imported and asked == []
    # torch makes this folder, empty, when diffusers imports torch._dynamo.
    assert {name for name in left if not name.startswith("TMPDIR/torchinductor_")} == set()
    assert len(left) <= 1


def test_a_setting_of_the_user_stays():
    code = (
        "import os, diffusers_safe; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['HF_HUB_DISABLE_TELEMETRY'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(ORT_DISABLE_TELEMETRY="0"), capture_output=True, text=True
    )
    assert done.stdout.split() == ["0", os.environ.get("HF_HUB_DISABLE_TELEMETRY", "1")]
