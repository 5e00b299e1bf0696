"""Cut the CLIP and T5 vocabularies of FLUX down to what the captions need.

The kept pieces have the same spelling, order and scores as in the full
vocabularies, so every caption is split exactly as FLUX itself would split it.
Needs the two full tokenizers on disk; the result is in the repository, so this
script only has to be run again when the captions change.
"""
import argparse
import json
import random
import shutil
from pathlib import Path

from data import all_captions
from sentencepiece import sentencepiece_model_pb2 as pb
from transformers import AutoTokenizer, CLIPTokenizer, T5TokenizerFast

# a few everyday words beyond the captions, so that free prompts are not all single letters
EXTRA = ("a the of and with in on at to is it this that picture photo image drawing painting icon emoji "
         "cute small big little happy sad old new bright dark light two three one sitting flying "
         "brown gold golden silver cyan night day sky sea grass style cartoon simple").split()


def prune_clip(source, target, texts):
    """Keep the 512 byte pieces and every merge used while building the texts' words."""
    full = CLIPTokenizer.from_pretrained(source)
    lines = (source / "merges.txt").read_text().splitlines()
    rank = {tuple(l.split()): i for i, l in enumerate(lines[1:]) if l}
    words = {w for t in texts for w in t.lower().replace(",", " , ").replace("-", " - ").split()}
    used = set()
    for word in words:  # byte pair merging, as CLIP does it, noting each merge
        parts = [*word[:-1], word[-1] + "</w>"]
        while True:
            pairs = [(rank.get(p, 1 << 30), i) for i, p in enumerate(zip(parts, parts[1:]))]
            if not pairs or min(pairs)[0] == 1 << 30:
                break
            i = min(pairs)[1]
            used.add((parts[i], parts[i + 1]))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
    merges = sorted(used, key=rank.get)
    pieces = json.loads((source / "vocab.json").read_text())
    keep = {p for p, i in pieces.items() if i < 512} | {a + b for a, b in merges}
    order = sorted(keep, key=pieces.get) + ["<|startoftext|>", "<|endoftext|>"]
    target.mkdir(parents=True, exist_ok=True)
    (target / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(order)}, ensure_ascii=False))
    (target / "merges.txt").write_text("\n".join([lines[0]] + [" ".join(m) for m in merges]) + "\n")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, target / name)
        (target / name).chmod(0o644)
    small = CLIPTokenizer.from_pretrained(target)
    for t in texts:
        assert small.tokenize(t) == full.tokenize(t), t
    return len(order)


def prune_t5(source, target, texts):
    """Keep the pieces the texts use, the single characters, and the 100 sentinels."""
    full = AutoTokenizer.from_pretrained(source)
    model = pb.ModelProto()
    model.ParseFromString((source / "spiece.model").read_bytes())
    used = {p for t in texts for p in full.tokenize(t)}
    ascii_pieces = {chr(c) for c in range(33, 127)} | {"▁" + chr(c) for c in range(33, 127)}
    kept = [p for i, p in enumerate(model.pieces)
            if i < 3 or p.piece in used or p.piece in ascii_pieces or p.piece == "▁"]
    del model.pieces[:]
    model.pieces.extend(kept)
    target.mkdir(parents=True, exist_ok=True)
    (target / "spiece.model").write_bytes(model.SerializeToString())
    # the fast form: same pieces and scores inside the full tokenizer.json
    fast = json.loads((source / "tokenizer.json").read_text())
    score = dict((p, s) for p, s in fast["model"]["vocab"])
    vocab = [[p.piece, score.get(p.piece, p.score)] for p in kept]
    vocab += [[f"<extra_id_{i}>", 0.0] for i in range(99, -1, -1)]
    fast["model"]["vocab"] = vocab
    index = {p: i for i, (p, _) in enumerate(vocab)}
    for token in fast["added_tokens"]:
        token["id"] = index[token["content"]]
    (target / "tokenizer.json").write_text(json.dumps(fast, ensure_ascii=False))
    config = json.loads((source / "tokenizer_config.json").read_text())
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            str(index[t["content"]]): t for t in config["added_tokens_decoder"].values()}
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    shutil.copyfile(source / "special_tokens_map.json", target / "special_tokens_map.json")
    (target / "special_tokens_map.json").chmod(0o644)
    small = T5TokenizerFast.from_pretrained(target)
    for t in texts:
        assert small.tokenize(t) == full.tokenize(t), t
    return len(vocab)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clip", type=Path, required=True, help="tokenizer of openai/clip-vit-large-patch14")
    parser.add_argument("--t5", type=Path, required=True, help="tokenizer of google/t5-v1_1-xxl")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "emoji")
    a = parser.parse_args()
    captions = all_captions()
    random.Random(0).shuffle(captions)
    texts = captions + EXTRA
    print("CLIP pieces:", prune_clip(a.clip, a.out / "tokenizer", texts))
    print("T5 pieces:", prune_t5(a.t5, a.out / "tokenizer_2", texts))
