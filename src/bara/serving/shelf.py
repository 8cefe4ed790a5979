"""The adapters of a server: those it started with, and those that clients load and unload."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bara.cards.adapter_files import CONFIG_FILE, RECIPE_FILE, WEIGHTS_FILE, read_shapes
from bara.errors import BaraError
from bara.export.plain_lora import PREFIX
from bara.finetuning.load import load_base_of, read_task
from bara.language.tasks import LanguageTask
from bara.methods.recipe import TrainRecipe
from bara.serving.batcher import Job
from bara.serving.decoding import Decoder
from bara.serving.limits import Limits
from bara.serving.metrics import Metrics
from bara.serving.prediction import Predictor
from bara.serving.problems import Problem
from bara.serving.schemas import LoadRequest
from bara.serving.served import Served, base_of, load_one

LOG = logging.getLogger("bara.serving")


class Shelf:
    """Adapters by their names, with what answers for them.

    A request holds what it was given here: on an adapter that is unloaded meanwhile it finishes.

    Args:
        served: what is there from the start and stays.
        limits: of the server.
        metrics: are told of answers.
        load_from: folder that clients may load adapters from; None if they may not.
        base_model: where the base model of all of them is, as of `load_served`.
    """

    def __init__(
        self,
        served: Sequence[Served],
        limits: Limits,
        metrics: Metrics,
        *,
        load_from: Path | None = None,
        base_model: str | None = None,
    ) -> None:
        self.limits = limits
        self.metrics = metrics
        self.load_from = load_from and load_from.resolve()
        self.base_model = base_model
        self._predictors: dict[str, Predictor] = {}
        self._decoders: dict[str, Decoder] = {}
        self._loaded: set[str] = set()
        self._bases: dict[str, PreTrainedModel] = {}
        for one in served:
            self._put(one)

    @property
    def served(self) -> list[Served]:
        """All of them."""
        return [predictor.served for predictor in self._predictors.values()]

    def predictor(self, model: str | None) -> Predictor:
        """What predicts with the adapter that a request names; it need not where there is one.

        Raises:
            Problem: 400: it has to; 404: there is none of that name.
        """
        names = ", ".join(self._predictors)
        if model is None and len(self._predictors) > 1:
            raise Problem(400, f"model is missing: there are {names}", param="model")
        name = next(iter(self._predictors)) if model is None else model
        if name not in self._predictors:
            raise Problem(404, f"there is no model {name!r} here: there are {names}", param="model")
        return self._predictors[name]

    def decoder(self, model: str | None) -> Decoder:
        """What generates with it.

        Raises:
            Problem: as `predictor`, or 400: it is no language model.
        """
        name = self.predictor(model).served.name
        if name not in self._decoders:
            raise Problem(400, f"{name} is no language model: use /v1/predict", param="model")
        return self._decoders[name]

    def load_job(self, request: LoadRequest) -> Job:
        """The work of loading an adapter, which gives a `Served` for `add`.

        It runs between passes, since loading changes what all of torch does meanwhile (the type of
        new tensors).

        Raises:
            Problem: 403: this server loads none; 400: the name is taken, there are too many, or the
                folder is no adapter's that may be loaded.
        """
        self._require_loading()
        self._require_free(request.lora_name)
        folder = self._folder(request.lora_path)
        deadline = time.monotonic() + self.limits.seconds
        return Job(self._load, (object(),), 1, (request.lora_name, folder), deadline)

    def add(self, one: Served) -> None:
        """Puts an adapter that was loaded beside the others.

        Raises:
            Problem: 400: another one has taken its name or the last place.
        """
        self._require_free(one.name)
        self._loaded.add(one.name)
        self._put(one)

    def remove(self, name: str) -> None:
        """Takes an adapter away that a client loaded.

        Raises:
            Problem: 403: this server loads none; 400: it was there from the start; 404: there is
                none.
        """
        self._require_loading()
        self.predictor(name)
        if name not in self._loaded:
            message = f"{name} was there from the start, and stays"
            raise Problem(400, message, param="lora_name")
        self._loaded.remove(name)
        del self._predictors[name]
        self._decoders.pop(name, None)

    def _put(self, one: Served) -> None:
        self._predictors[one.name] = Predictor(one, self.limits, self.metrics)
        if one.generates:
            self._decoders[one.name] = Decoder(one, self.limits, self.metrics)

    def _load(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            name, folder = job.payload
            try:
                base = self._base(folder) or self.base_model
                job.finish(load_one(name, folder, self.served, base_model=base))
            except BaraError as error:
                raise _not_loaded(folder, error) from error

    def _base(self, folder: Path) -> PreTrainedModel | None:
        """The base model of a language model's adapter: read once, its weights one memory with
        those of all adapters on it, but for what this adapter has trained of them (biases). None
        for a classifier, whose base depends on its classes."""
        if not isinstance(read_task(folder), LanguageTask):
            return None
        options = TrainRecipe.load(folder / RECIPE_FILE).model_options
        key = f"{base_of(folder)} {options}"
        if key not in self._bases:
            self._bases[key] = load_base_of(folder, base_model=self.base_model)
        base = self._bases[key]
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        named = base.state_dict(keep_vars=True)
        for name in _saved_base_names(folder) & named.keys():  # PEFT loads these in place
            shared.pop(id(named[name]), None)
        return copy.deepcopy(base, shared)

    def _require_loading(self) -> None:
        if self.load_from is None:
            message = "this server loads no adapters: start it with --load-from and --api-key-file"
            raise Problem(403, message)

    def _require_free(self, name: str) -> None:
        if name in self._predictors:
            message = f"{name!r} has already been loaded: unload it, or choose another name"
            raise Problem(400, message, param="lora_name")
        if len(self._loaded) >= self.limits.adapters:
            message = f"{len(self._loaded)} adapters have been loaded, and no more may: unload one"
            raise Problem(400, message, param="lora_name")

    def _folder(self, given: str) -> Path:
        """The folder of an adapter inside `load_from`, with nothing in it that is elsewhere."""
        root: Any = self.load_from
        try:
            folder = (root / given).resolve(strict=True)
            inside = folder.is_relative_to(root) and (folder / CONFIG_FILE).is_file()
            inside = inside and all(p.resolve().is_relative_to(root) for p in folder.rglob("*"))
        except (OSError, ValueError, RuntimeError):  # not there, a null character, a circle
            inside = False
        if not inside:  # in one line, which does not tell what there is elsewhere
            message = "lora_path must be an adapter's folder inside the one of --load-from"
            raise Problem(400, message, param="lora_path")
        bases = {base_of(one.folder) for one in self.served}
        try:
            known = base_of(folder) in bases - {None}
        except BaraError as error:
            raise _not_loaded(folder, error) from error
        if not known:
            message = "the adapter is not on a base model that this server has"
            raise Problem(400, message, param="lora_path")
        return folder


def _saved_base_names(folder: Path) -> set[str]:
    """The tensors of an adapter's files, an ensemble's members' too, as a base model calls them."""
    keys = {key for path in folder.rglob(WEIGHTS_FILE) for key in read_shapes(path.parent)}
    return {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in keys}


def _not_loaded(folder: Path, error: BaraError) -> Problem:
    """How it is told that an adapter is damaged, which may be about any file of the machine."""
    LOG.warning("%s: %s", folder, error)
    message = "the adapter cannot be loaded; the server's log says why"
    return Problem(400, message, param="lora_path")
