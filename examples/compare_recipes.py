"""Compare any set of settings, paired by seed, with confidence intervals: here two optimizers.

A plan says what all contenders share and in what each differs; the same could be a YAML file for `deit compare --plan`. Two seeds
and twenty steps are for a first try: they show nothing. Take three seeds or more, and as many epochs as you mean to train.
"""

# %% A plan
import deitkit as dk

plan = {
    "shared": {"student": "deit_pico", "steps": 20, "distillation": "none"},
    "seeds": [0, 1],
    "baseline": "muon",
    "contenders": {
        "muon": {"augment": "light"},
        "adamw": {"augment": "light", "optimizer": "adamw"},
    },
}

# %% Run it; interrupted, the same with resume=True continues
result = dk.compare("digits", out="runs/recipes", plan=plan)

# %% Mean and standard deviation over the seeds, and the difference from the baseline
for contender in result["contenders"]:
    head, difference = contender["val"]["heads"]["cls"], contender["val"]["difference"]
    line = f"{contender['name']}: {head['mean']:.1%} ± {head['sd']:.1%} (n = {head['n']})"
    print(line if difference is None else f"{line}, {100 * difference['mean']:+.1f} points")

# %% Tables, plots and every run stand on one page
print("runs/recipes/compare.html")
