"""Short synthetic reviews in which one word decides the label, and a tokenizer for their few words."""

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TELLING = (["dull", "flat", "cold", "clumsy", "long"], ["warm", "clever", "bright", "moving", "rich"])
PLAIN = ["a", "film", "of", "the", "story", "and", "its", "people", "is", "was"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", *TELLING[0], *TELLING[1], *PLAIN]


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def reviews(tokenizer, count, wrong, seed):
    """Reviews of eight to twelve words; a share ``wrong`` of them has the wrong label."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        label = draw.randrange(2)
        words = [*draw.choices(PLAIN, k=draw.randint(7, 11)), draw.choice(TELLING[label])]
        draw.shuffle(words)
        found.append({**tokenizer(" ".join(["[CLS]", *words])), "labels": label ^ (draw.random() < wrong)})
    return found
