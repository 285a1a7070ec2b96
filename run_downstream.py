# %% [markdown]
# Measure an encoder

One measurement from start to record: find the encoder of a pretraining run, measure it on one task, keep the numbers. In JupyterLab edit the parameters and run all cells; from a shell

```
papermill nbs/run_downstream.ipynb downstream.ipynb -p run 06d8eb3904176192 -p task low_label
```

`run` is the id of a finished run whose checkpoint lies under `data/checkpoints`. What is finished is shown from its record and not measured again. papermill reads an id like `1234567890123e45` as a number: give such a one with `-r` instead of `-p`.

# %%
import os, re
from pid_ssl.config import ConfigError
from pid_ssl.downstream import DownstreamConfig, downstream_config, run_downstream

_before = set(globals())

# %% tags=["parameters"]
run: str = ''  # pretraining run whose encoder is measured: 16 hexadecimal digits
task: str = 'classify'  # what is measured [classify, transfer, low_label, finetune, two_view, audit]
weights: str = 'pretrained'  # encoder of the run, its untrained control, or raw pixels [pretrained, untrained, pixels]
dataset: str = 'auto'  # dataset that is measured on; auto: the run's own
image_size: int = None  # pixels a side that images are resized to; default the run's
train_size: int = None  # labelled training images, class-balanced; 0: all of them; default as many as the run had, or all where there are fewer (classify, transfer, finetune, two_view, audit)
eval_on: str = 'test'  # split that is measured on; choose settings on val [test, val]
seed: int = 0  # seed of order, augmentation and resampling (low_label, finetune, audit)
fraction: float = 0.01  # share of all training images of each class that keep their label (low_label)
draws: int = 3  # draws of the labelled images, the same for every encoder (low_label)
epochs: int = None  # passes of fine-tuning over the labelled images (low_label, finetune)
lr: float = None  # peak learning rate of the linear head in fine-tuning (low_label, finetune)
encoder_lr: float = None  # peak learning rate of the encoder in fine-tuning (low_label, finetune)
batch_size: int = 64  # images a step of fine-tuning (low_label, finetune)
policy: str = 'auto'  # augmentation policy of the views; auto: the run's [auto, none, digits, cifar, cifar_weak, cifar_strong, simclr, byol] (two_view, audit)
codes: int = 8  # k-means cells of each view (audit)
components: int = 16  # principal components in the Gaussian decomposition (audit)
permutations: int = 100  # shuffles of the labels (audit)
replicates: int = 50  # bootstrap resamples (audit)
device: str = 'auto'  # auto takes CUDA when there is one [auto, cpu, cuda, mps]
threads: int = None  # CPU threads; default $OMP_NUM_THREADS, else all cores but one, up to 8
data_dir: str = None  # folder of Parquet datasets; default $PID_SSL_DATA, then data/datasets
home: str = None  # folder with data/checkpoints that gets data/downstream; default the project root
force: bool = False  # measure again although a finished record exists [True or False]

# %% [markdown]
Whatever was set since the first cell is a parameter. A name that `DownstreamConfig` does not know, or a value out of its range, stops the notebook now, before any work.

# %%
given = {k: v for k, v in globals().copy().items()
         if k in DownstreamConfig.__dataclass_fields__ or k not in _before and not re.fullmatch('_.*|In|Out', k)}
if os.environ.get('IN_TEST') and not given['run']:  # the test suite runs this notebook on a run of its own
    from pid_ssl.config import Config
    from pid_ssl.trainers import pretrain
    given |= dict(run=pretrain(Config(loss='barlow', epochs=1)).run_id, home=None)
config = downstream_config({k: v for k, v in given.items() if v is not None})
if not config.run: raise ConfigError('run', config.run, 'the id of a pretraining run, 16 hexadecimal digits')

# %% [markdown]
## Measure

# %%
record = run_downstream(config)

# %% [markdown]
## What came out
Every number names its split and its protocol; the record keeps them with the encoder they belong to.

# %%
import pandas as pd

pd.Series(record.metrics, name=record.run_id).to_frame()
