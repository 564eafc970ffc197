# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A search as a data frame
#
# `patchloom tune` writes a folder with one row per trial. `patchloom.load_trials` reads it as a pandas `DataFrame`.
# This reads the search of `patchloom demo --pixels --out demo-pixels`: run it first, or put the folder of your own
# search here.

# %%
import matplotlib.pyplot as plt

import patchloom

SEARCH = "demo-pixels/search"

# %%
trials = patchloom.load_trials(SEARCH)
print(trials[["patches.p", "repeat", "status", "images_seen", "flops", "held_out_loss"]].to_string())

# %% [markdown]
# ## Settings
#
# The settings of a search are columns named as recipe keys. `keys` lists them.

# %%
keys = trials.attrs["keys"]
finished = trials[trials.status == "finished"]
table = finished.groupby(keys)["held_out_loss"].agg(["mean", "std", "count"]).sort_values("mean")
print(table)

# %% [markdown]
# ## Quality against cost

# %%
figure, axes = plt.subplots(figsize=(6, 4))
for p, group in finished.groupby("patches.p"):
    axes.scatter(group.flops / 1e12, group.held_out_loss, label=f"p = {p:g}")
axes.set_xlabel("TFLOP")
axes.set_ylabel("held-out loss")
axes.legend()

# %% [markdown]
# ## Noise levels
#
# The held-out loss is measured at several noise levels: which p is best may depend on the level.

# %%
by_sigma = finished.filter(regex=r"^held_out_loss_by_sigma\.").rename(columns=lambda name: name.rpartition("sigma.")[2])
print(by_sigma.groupby(finished["patches.p"]).mean())
