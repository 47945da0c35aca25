"""Turn JSON lines of text into a corpus for pretraining, in Megatron's indexed format.

python tools/preprocess_data.py --input a.jsonl b.jsonl --output-prefix corpus/text \
    --tokenizer hf --tokenizer-path models/qwen3

Then: megatron-occ pretrain data.corpus=corpus/text data.task.name=null ...
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Tokenize JSON lines into P.bin, P.idx and P.meta.json for pretraining."
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="one JSON object a line")
    add("--key", default="text", help="name of the text in the object (default: text)")
    add("--output-prefix", required=True, metavar="P", help="path of the output, without suffix")
    add("--tokenizer", required=True, choices=("char", "hf"), help="as tokenizer.kind of the run")
    add("--alphabet", help="characters of a char tokenizer, in the order of their ids")
    add("--tokenizer-path", metavar="DIR", help="folder of a Hugging Face tokenizer")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the eos token (default: yes)",
    )
    add("--force", action="store_true", help="replace an existing corpus")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the corpus and print how much there is; bad input ends with one line of error."""
    arguments = parse_arguments(argv)
    # After parsing, so that --help answers at once.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        from megatron_occ.mcore.corpus import write_corpus
    from megatron_occ.data import build_tokenizer

    start = time.monotonic()
    try:
        tokenizer = build_tokenizer(
            arguments.tokenizer, alphabet=arguments.alphabet, path=arguments.tokenizer_path
        )
        meta = write_corpus(
            arguments.input,
            arguments.output_prefix,
            tokenizer,
            key=arguments.key,
            append_eod=arguments.append_eod,
            force=arguments.force,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{arguments.output_prefix}: {meta['documents']:,} documents, {meta['tokens']:,} tokens, "
        f"{meta['bytes']['.bin'] / 1e6:,.1f} MB, {time.monotonic() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
