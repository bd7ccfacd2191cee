"""Search your own pictures, sounds and videos by words, by a picture or by a sound.

    python search.py index ~/photos --checkpoint outputs/checkpoints/best_model.pt     # once, and after changes
    python search.py index ~/photos --exclude '*.gif'                                  # --replace: for another folder
    python search.py query "a dog barks"
    python search.py query --image dog.jpg --kind audio --top 5
    python search.py query --audio bark.wav --json
    python search.py serve                                   # a page for the browser, at http://127.0.0.1:8000/
    python search.py serve --host 0.0.0.0 --port 8080        # for every machine that reaches this one

The index lies in ./outputs/index unless --index names another folder, never among the files that are indexed.
Exit codes: 0 done, 2 a mistake in what was asked for, 130 interrupted (index goes on where it was), 141 nobody
reads the output any more, such as head.
"""

import argparse
import sys

from trimodal.arguments import Parser, environment_needed, exit_code, folder_name
from trimodal.errors import UserError
from trimodal.openmp import bound_waiting
from trimodal.redaction import without_secrets

with environment_needed("torch"):
    import trimodal.config  # noqa: F401


def words(text: str) -> str:
    """Type of an argument: something to look for."""
    if not text.strip():
        raise argparse.ArgumentTypeError('is empty; say what to look for, such as "a dog barks"')
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes that Python kept so
        raise argparse.ArgumentTypeError("is no UTF-8; set the terminal to UTF-8")
    return text


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__ or "")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    index = commands.add_parser("index", help="make or renew the index of a folder", description=(
        "Encode the pictures, sounds and videos of a folder and of those below it. Again: only what is new or changed "
        "is encoded, and what is gone is forgotten."))
    index.add_argument("folder", type=folder_name, metavar="FOLDER", help="what is to be searched; it is only read")
    index.add_argument("--checkpoint", type=folder_name, metavar="FILE", help="best_model.pt, any other checkpoint, "
                       "the output folder of a run, an exported folder, or hub:OWNER/NAME (or hub:FOLDER) of a CLIP, "
                       "SigLIP or CLAP of transformers (default: that of the index, where there is one)")
    index.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave out files and folders "
                       "whose name or path matches, such as '*.gif' or 'old/*'; may be given again")
    index.add_argument("--replace", action="store_true", help="where the index is of another folder or model, put this "
                       "one in its place")
    query = commands.add_parser("query", help="print what is most like a text, a picture or a sound", description=(
        "Print the best pictures and the best sounds, each ranked by itself."))
    question = query.add_mutually_exclusive_group(required=True)
    question.add_argument("texts", nargs="?", type=words, metavar="TEXT", help='such as "a dog barks"')
    question.add_argument("--image", dest="images", type=folder_name, metavar="FILE", help="a picture, or a video for "
                          "its middle frame")
    question.add_argument("--audio", type=folder_name, metavar="FILE", help="a sound, or a video for its sound track")
    query.add_argument("--kind", choices=("image", "audio"), help="only these (default: all kinds)")
    query.add_argument("--top", type=int, default=10, metavar="N", help="so many of each kind (default 10)")
    query.add_argument("--json", action="store_true", help="print JSON")
    serve = commands.add_parser("serve", help="open a page to search in, for the browser", description=(
        "Serve a page that finds pictures and sounds by words, pictures, sounds and recordings, until Ctrl-C. Only "
        "this machine can open it, unless --host names another address of it."))
    serve.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one (default 8000)")
    for command in (query, serve):
        command.add_argument("--checkpoint", type=folder_name, metavar="FILE", help="where the model is now (default: "
                             "where it was when the index was made)")
    for command in (index, query, serve):
        command.add_argument("--index", type=folder_name, metavar="DIR", default="./outputs/index", help="folder of "
                             "the index (default ./outputs/index)")
        command.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps")
    options = parser.parse_args(arguments)
    if options.command == "query" and options.top < 1:
        query.error(f"--top: {options.top} is below 1")
    if options.command == "serve" and not 0 <= options.port <= 65535:
        serve.error(f"--port: {options.port} is outside 0 to 65535")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    bound_waiting(print if options.command == "index" else lambda line: None)  # a query prints its answer alone
    try:
        from trimodal.search import commands  # loads torch, which --help need not

        getattr(commands, options.command)(options)
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "; what is encoded is kept, and the same command goes on" * (options.command == "index")
        print(f"\nInterrupted{kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
