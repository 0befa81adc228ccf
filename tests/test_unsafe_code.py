"""The package holds nothing that runs what a file or a peer says; the search finds each way."""

from __future__ import annotations

from pathlib import Path

import pytest
from unsafe_code import unsafe

PACKAGE = Path(__file__).parents[1] / "flap_nvflare"
FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_package_holds_nothing_unsafe() -> None:
    assert len(FILES) > 100
    found = {
        str(path.relative_to(PACKAGE)): faults
        for path in FILES
        if (faults := unsafe(path.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as json",
        "def f():\n    from pickle import loads",
        "import cPickle",
        "import _pickle",
        "import cloudpickle",
        "import dill",
        "from joblib import load",
        "import marshal",
        "import shelve",
        "from torch.package import pickle",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module as load\nload('dill')",
        "__import__('pickle')",
        "eval('1')",
        "list(map(eval, texts))",
        "exec(text)",
        "def f(compile):\n    return eval(compile)",
        "compile(text, '', 'exec')",
        "run = exec",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import eval as calculate\ncalculate('1')",
        "import yaml\nyaml.load(text, yaml.SafeLoader)",
        "from yaml import load\nload(text)",
        "import yaml\nyaml.full_load(text)",
        "import yaml\nyaml.unsafe_load(text)",
        "import yaml\nyaml.load_all(text)",
        "import yaml\nclass Reader(yaml.UnsafeLoader): ...",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=trusted)",
        "import torch\ntorch.load(path, **options)",
        "from torch import load\nload(path)",
        "import torch as t\nt.load(path)",
        "import torch\ntorch.jit.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=trusted)",
        "import numpy as np\nnp.load(path, None, True)",
        "from numpy import load\nload(path, **options)",
        "import numpy as np\nnp.lib.format.read_array(file, allow_pickle=True)",
        "import pandas as pd\npd.read_pickle(path)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "from subprocess import Popen\nPopen(text, shell=1)",
        "import subprocess\nsubprocess.getoutput(text)",
        "import os\nos.system(text)",
        "from os import popen\npopen(text)",
        "import tempfile\ntempfile.mktemp()",
        "from tempfile import mktemp\nmktemp()",
    ],
)
def test_each_unsafe_way_is_found(source: str) -> None:
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('a')",
        "import torch\ntorch.compile(network)",
        "compile: str = 'auto'",
        "def choose(compile: str) -> bool:\n    return compile == 'on'",
        "network.eval()",
        "import yaml\nyaml.safe_load(text)",
        "import torch\ntorch.load(path, weights_only=True)",
        "from safetensors.torch import load\nload(data)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import json\njson.load(file)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "from tempfile import mkstemp\nmkstemp()",
    ],
)
def test_what_looks_alike_is_let_be(source: str) -> None:
    assert not unsafe(source)
