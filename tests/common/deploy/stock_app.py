"""An app around the SDK's own MonaiBundleInferenceOperator: python stock_app.py BUNDLE IMAGE.npy PRED.npy."""

import sys
from pathlib import Path

import numpy as np
from monai.deploy.conditions import CountCondition
from monai.deploy.core import AppContext, Application, IOType, Operator, OperatorSpec
from monai.deploy.operators.monai_bundle_inference_operator import (
    BundleConfigNames,
    IOMapping,
    MonaiBundleInferenceOperator,
)


class Source(Operator):
    def setup(self, spec: OperatorSpec) -> None:
        spec.output("image")

    def compute(self, op_input, op_output, context) -> None:
        op_output.emit(np.load(sys.argv[2]), "image")


class Sink(Operator):
    def setup(self, spec: OperatorSpec) -> None:
        spec.input("pred")

    def compute(self, op_input, op_output, context) -> None:
        np.save(sys.argv[3], op_input.receive("pred"))


class App(Application):
    def compose(self) -> None:
        infer = MonaiBundleInferenceOperator(
            self,
            app_context=AppContext({}),
            input_mapping=[IOMapping("image", np.ndarray, IOType.IN_MEMORY)],
            output_mapping=[IOMapping("pred", np.ndarray, IOType.IN_MEMORY)],
            bundle_path=Path(sys.argv[1]),
            bundle_config_names=BundleConfigNames(config_names=["inference", "deploy"]),
            name="infer",
        )
        self.add_flow(Source(self, CountCondition(self, 1), name="source"), infer, {("image", "image")})
        self.add_flow(infer, Sink(self, name="sink"), {("pred", "pred")})


if __name__ == "__main__":
    App([sys.executable]).run()
