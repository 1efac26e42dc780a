"""Small stores for tests: built from videos, written from random ids, and edited."""

import json

import numpy as np

from vimpac.config import TokenizeConfig
from vimpac.data.build import tokenize_videos
from vimpac.data.format import StoreSettings, TokenizerInfo, View
from vimpac.data.store import StoreWriter, TokenStore
from vimpac.files.checked import write_json

CONFIG = TokenizeConfig(codes=32, frame_size=32, fps=5.0)
VIEWS = (View(), View(flip=True))
SETTINGS = StoreSettings(TokenizerInfo("patch-vq", 512, 8, "ab" * 32), fps=2.0, frame_size=24, views=VIEWS)


def build(videos, out, config=CONFIG, **options):
    """`vimpac tokenize` with one worker, without progress."""
    return tokenize_videos(videos, out, config, progress=False, **({"workers": 1} | options))


def content(folder):
    """Everything that a store holds, for comparison."""
    store = TokenStore(folder)
    reads = [[store.read(n, view=v).tolist() for v in range(len(store.views))] for n in range(len(store))]
    return store.names, store.tokenizer, reads


def random_videos(count=7, seed=0):
    """Ids [2 views, 1 to 8 frames, 3, 3] by name, in a shuffled order."""
    generator = np.random.default_rng(seed)
    names = [f"class{i % 3}/{i:02d}.mp4" for i in generator.permutation(count)]
    return {name: generator.integers(0, 512, (2, generator.integers(1, 9), 3, 3), dtype=np.uint16) for name in names}


def write(folder, videos, rank=0, **options):
    """Finished shards of these videos, not yet a store."""
    writer = StoreWriter(folder, SETTINGS, rank, **options)
    for name, ids in videos.items():
        writer.add(name, ids)
    writer.close()


def read_all(store):
    """The first view of all videos."""
    return [store.read(number).tolist() for number in range(len(store))]


def edit(path, **changes):
    """Gives a JSON file other values and a right checksum, so that later checks see them."""
    fields = json.loads(path.read_text()) | changes
    del fields["checksum"]
    write_json(path, fields)
