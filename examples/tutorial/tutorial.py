# %% [markdown]
# # Tutorial: pretrain from Python, and look at what was learnt
#
# This page is a script, `examples/tutorial/tutorial.py`, whose cells VS Code, PyCharm and Jupytext show as a
# notebook. It makes a few small phantom scans, pretrains a small network on a CPU, puts the weights into a
# segmentation network, and looks at the pictures. It takes a few minutes:
#
# ```
# python examples/tutorial/tutorial.py --folder tutorial
# ```
#
# The commands for the same job are in [getting started](../../docs/getting-started.md).

# %%
from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
options = argparse.ArgumentParser(description="Pretrain on phantoms from Python, and look at what was learnt.")
options.add_argument("--folder", type=Path, default=Path("tutorial"), help="where everything is written")
options.add_argument("--epochs", type=int, default=8)
options.add_argument("--iterations", type=int, default=25, help="optimiser steps of an epoch")
args = options.parse_args()

# %% [markdown]
# ## nnU-Net's three folders, and phantom scans
#
# nnU-Net finds everything through three variables. They must be set before `nnunetv2` is imported. With your own
# data you have them already, and datasets in `nnUNet_raw`; the phantoms stand for them: dataset 900 without labels,
# dataset 901 with labels.

# %%
folder = args.folder.resolve()
for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    (folder / name).mkdir(parents=True, exist_ok=True)
    os.environ[name] = str(folder / name)

phantoms = HERE.parent / "demo" / "phantoms.py"
counts = ["--labelled", "5", "--unlabelled", "12", "--test", "1"]
subprocess.run([sys.executable, str(phantoms), os.environ["nnUNet_raw"], *counts], check=True)

# %% [markdown]
# ## Plan
#
# nnU-Net plans the labelled dataset as always. The plan variant `cpu` has a small network and a small patch, so that
# a CPU can train it; with a GPU take nnU-Net's own plan and leave this out.

# %%
binaries = Path(sys.executable).parent
plan = ["-d", "901", "-c", "3d_fullres"]
environment = {k: v for k, v in os.environ.items() if k != "nnUNet_n_proc_DA"}  # nnU-Net's planner takes no 0 there
command = [str(binaries / "nnUNetv2_plan_and_preprocess"), *plan, "-npfp", "1", "-np", "1"]
subprocess.run(command, check=True, env=environment)

os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}  # for a machine with few cores, only after planning

from nnssl.plans import load_plan  # noqa: E402
from nnssl.weights import write_variant  # noqa: E402

if not (folder / "nnUNet_preprocessed" / "Dataset901_PhantomLabelled" / "nnUNetPlans_cpu.json").is_file():
    write_variant(load_plan(901), "cpu", features=(8, 16, 32), patch=(16, 40, 40))

# %% [markdown]
# ## Pretrain
#
# One call does what `nnssl_pretrain` does: it preprocesses dataset 900 with the plan of 901, trains a masked
# autoencoder, and judges it on cases that were held out.

# %%
import nnssl.pretrain  # noqa: E402

result = nnssl.pretrain.run(
    900,
    target=901,
    method="mae",
    plans="nnUNetPlans_cpu",
    device="cpu",
    epochs=args.epochs,
    iterations=args.iterations,
    options={"preset": "adamw", "lr": 2e-3, "batch_size": 4},
    continue_run="auto",
)
print(result.sentence)

# %% [markdown]
# ## Look
#
# The run has drawn its curves and what the network sees. The grey lines are what a network reaches that has learnt
# nothing; the sentence below the panels is the verdict. [How to read them](../../docs/tasks/watch-a-run.md).

# %%
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imread  # noqa: E402

views = sorted(result.folder.glob("views_epoch_*.png"))
pictures = {"Before training": views[0], "After training": views[-1], "Progress": result.folder / "progress.png"}
for title, picture in pictures.items():
    print(f"{title}: {picture}")

images = [imread(p) for p in (views[0], views[-1])]
figure = Figure(figsize=(14, 8), layout="constrained")
for ax, image, title in zip(figure.subplots(1, 2), images, pictures):
    ax.imshow(image)
    ax.set_title(title)
    ax.axis("off")
figure.savefig(folder / "before_and_after.png", dpi=120)

# %% [markdown]
# ## Use the weights
#
# Any network of the plan takes them, and a report says part by part what was loaded, adapted and left random. In
# practice nnU-Net's own command does this: `nnUNetv2_train 901 3d_fullres 0 -p nnUNetPlans_cpu -tr
# nnUNetTrainerPretrained`.

# %%
from nnssl import checkpoint, networks, transfer  # noqa: E402

assert result.checkpoint is not None, "the run was stopped early; start the script again to go on"
plan_cpu = load_plan(901, plans_name="nnUNetPlans_cpu")
network = networks.build_network(plan_cpu)
report = transfer.apply(network, checkpoint.load(result.checkpoint), plan=plan_cpu)
print(report)
