"""Arguments that several commands take."""

from __future__ import annotations

import argparse

from fxcompress.commands.values import positive, text

__all__ = ["configured", "modelled", "reported", "saved", "shaped"]


def configured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=text, help="a YAML file with a 'compression' section")
    modelled(parser)
    parser.add_argument("--data", type=text, help="a data set's name, or a mapping ({type: digits, batch_size: 64})")
    shaped(parser)


def modelled(parser: argparse.ArgumentParser, required: bool = False) -> None:
    about = "a name, a mapping ({type: ResNet, depth: 18}), or a saved model's folder"
    parser.add_argument("--model", type=text, required=required, help=about)
    parser.add_argument("--weights", type=text, metavar="FILE", help="weights for the model")


def shaped(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", type=positive, nargs="+", metavar="N", help="of an example input, batch first")


def reported(parser: argparse.ArgumentParser) -> None:
    about = "write one self-contained HTML page that shows all of it"
    parser.add_argument("--report", type=text, metavar="PAGE.html", help=about)


def saved(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=text, help="the folder of a saved model")
