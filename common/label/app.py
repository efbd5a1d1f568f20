"""The MONAI Label app: label propagation and registration with each of its bundles. Needs MONAI Label."""

import logging
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import InputError
from common.label import folder, requests
from common.run.cli import sentence_of
from common.run.registrar import Registrar
from common.space import io

try:
    from monailabel.interfaces.app import MONAILabelApp
    from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
    from monailabel.utils.others.generic import device_list, name_to_device
except ImportError as error:
    raise ImportError(
        f"MONAI Label cannot be used here ({error}); common/label/README.md says how to install"
    ) from error

logger = logging.getLogger(__name__)
TEMPORARY = "registration_"  # how the names of our temporary files begin
TEMPORARY_FOLDER = "temporary"  # of a server, in the folder of its app


class RegistrationTask(InferTask):
    """One bundle in one role. The current scan is the fixed one, "moving" in the request the other.

    Its result is what `monai.bundle run` writes: the same code runs.

    Args:
        registrar: the bundle.
        propagate: True gives the warped label, False the scan or what "returns" asks for.
        movings: gives the ids to choose from.
        names: name -> number of the labels.
    """

    def __init__(
        self, registrar: Registrar, *, propagate: bool, movings: Callable[[], list[str]], names: dict[str, int]
    ) -> None:
        role = "label propagation" if propagate else "registration"
        kind = InferType.SEGMENTATION if propagate else InferType.OTHERS  # clients show segmentations only
        super().__init__(kind, names if propagate else {}, 3, f"{registrar.name}, {role}. {registrar.description}")
        self.registrar, self.propagate, self.movings, self.names = registrar, propagate, movings, names

    def is_valid(self) -> bool:
        return True

    def config(self) -> dict[str, Any]:
        """Options that clients show: a list becomes a drop-down."""
        returned = {} if self.propagate else {"returns": list(requests.RETURNED)}
        options = {"prealign": list(requests.PREALIGN), "refine_steps": 0, "device": device_list()}
        return {"moving": self.movings()} | returned | options

    def __call__(self, request: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Register the pair of files that `RegistrationApp.infer` has put into the request.

        Returns:
            The file to send, or None, and the JSON: the pair's row of results, "error" if something went wrong.
        """
        try:
            return self._register(request["pair"], request)
        except Exception as error:  # the server would answer any with a bare 500
            sentence = sentence_of(error)
            if sentence is None:
                logger.exception("registration failed")
                sentence = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            return None, problem(sentence)

    def _register(self, pair: requests.Pair, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        returned = "label" if self.propagate else requests.first(request.get("returns", "warped"))
        if not self.propagate and returned not in requests.RETURNED:
            raise InputError(f"returns: must be one of {', '.join(requests.RETURNED)}, got {returned!r}")
        options = requests.bundle_options(request) | {"device": name_to_device(request.get("device"))}
        options |= pair.lesions | ({"moving_label": pair.moving_label} if self.propagate else {})
        options |= {"save_inverse": True} if returned in ("inverse", "all") else {}
        options |= {"displacement": True} if returned in ("displacement", "all") else {}
        with tempfile.TemporaryDirectory(prefix=TEMPORARY) as place:
            found = self.registrar.register(pair.moving, pair.fixed, place, verbose=True, **options)
            row, files = found.row, found.folder
            result = {"registration": requests.plain(row)}
            if self.propagate:
                file = files / "warped_label.nii.gz"
                result["label_names"] = requests.label_names(io.read_label(file)[0], self.names)
            elif returned == "all":
                file = Path(shutil.make_archive(str(files), "zip", files))
            else:
                file = files / requests.RETURNED[returned]
            return _kept(file), result


def _kept(file: Path) -> str:
    """Move a result out of its temporary folder; who gets it, the server, removes it."""
    ending = "".join(file.suffixes[-2:]) if file.name.endswith(".nii.gz") else file.suffix
    with tempfile.NamedTemporaryFile(prefix=TEMPORARY, suffix=ending, delete=False) as kept:
        shutil.move(file, kept.name)
    return kept.name


def problem(sentence: str) -> dict[str, Any]:
    """The JSON of a request that failed."""
    return {"error": sentence, "label_names": {}}


class RegistrationApp(MONAILabelApp):
    """For every bundle of the app folder, BUNDLE_propagate (segmentation) and BUNDLE_register (others)."""

    uploads: Path | None = None  # of this process, if it is a server: also of an app that the host loads anew

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.content = folder.read_app(app_dir)
        description = "Deformable registration: labels of another scan or an atlas for this one"
        super().__init__(app_dir, studies, conf, name="Registration", description=description)

    def server_mode(self, mode: bool) -> None:
        """The host calls this when its server starts: from now on what clients upload lies in a private folder.

        The host writes an upload to Python's folder for temporary files and hands on the path, as if a client had
        named it; in the common folder nobody could tell the two apart.
        """
        super().server_mode(mode)
        if mode:
            folder = Path(self.app_dir).resolve() / TEMPORARY_FOLDER
            folder.mkdir(exist_ok=True)
            folder.chmod(0o700)
            RegistrationApp.uploads = folder
            tempfile.tempdir = str(folder)

    def init_infers(self) -> dict[str, InferTask]:
        tasks: dict[str, InferTask] = {}
        names = self.content["labels"] or self._names_found()
        for name, path in self.content["bundles"].items():
            registrar = Registrar(path, **self.content["options"])
            labelled = partial(requests.labelled, self.datastore())
            tasks[f"{name}_propagate"] = RegistrationTask(registrar, propagate=True, movings=labelled, names=names)
            every = partial(_sorted_images, self.datastore())
            tasks[f"{name}_register"] = RegistrationTask(registrar, propagate=False, movings=every, names={})
        return tasks

    def _names_found(self) -> dict[str, int]:
        """Names by number, from the first labelled scan of the studies."""
        for image in requests.labelled(self.datastore())[:1]:
            label = io.read_label(self.datastore().get_label_uri(image, requests.FINAL))[0]
            return requests.label_names(label, {})
        return {}

    def infer(self, request: dict[str, Any], datastore: requests.Studies | None = None) -> dict[str, Any]:
        """Run one request; what is wrong with it is said in "error" of the JSON result.

        Args:
            request: "model", "image" (id of the fixed scan, or an uploaded file), "moving" (id), and options.
            datastore: instead of the app's own.
        """
        studies = datastore or self.datastore()
        task = self._infers.get(request.get("model"))
        try:
            if task is None:
                raise InputError(f"model: must be one of {', '.join(self._infers)}, got {request.get('model')!r}")
            local = None if self.studies.startswith(("http://", "https://")) else Path(self.studies)
            kept = self.sessions()
            sessions = None if kept is None else Path(kept.store_path)
            places = {"folder": local, "uploads": self.uploads, "sessions": sessions}
            pair = requests.resolve(request, studies, label=task.propagate, **places)
        except InputError as error:
            return {"label": None, "tag": None, "file": None, "params": problem(str(error))}
        saved = {} if task.propagate else {"save_label": False}  # a scan must not become a label
        return super().infer(dict(request) | {"pair": pair} | saved, studies)

    def batch_infer(self, request: dict[str, Any], datastore: requests.Studies | None = None) -> dict[str, Any]:
        """Run over all, labelled or unlabelled studies; what fails is said in the log too, which a client can ask for.

        The host divides by the number of GPUs, also where it is 0.
        """
        several = bool(request.get("multi_gpu", True)) and torch.cuda.is_available()
        answers = super().batch_infer(dict(request) | {"multi_gpu": several}, datastore)
        for image, answer in answers.items():
            if sentence := answer.get("params", {}).get("error"):
                logger.warning("%s failed: %s", image, sentence)
        return answers


def _sorted_images(studies: requests.Studies) -> list[str]:
    return sorted(studies.list_images())
