# monai-register in a container, for the CPU:
#     docker build -t monai-register .
#     docker run --rm -v "$PWD:/data" monai-register moving.nii.gz fixed.nii.gz out
# for a GPU:
#     docker build -t monai-register --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#     docker run --rm --gpus all -v "$PWD:/data" monai-register moving.nii.gz fixed.nii.gz out
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY setup.py setup.cfg pyproject.toml README.md LICENSE ./
COPY common common
COPY bundles bundles
RUN pip wheel --no-deps --wheel-dir wheels .

FROM python:${PYTHON}-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=2.13.0
WORKDIR /install
RUN pip install --no-cache-dir torch==${TORCH} --index-url ${TORCH_INDEX}
COPY --from=build /source/wheels wheels
RUN pip install --no-cache-dir wheels/*.whl
# Caches of libraries go where any user may write: `docker run --user $(id -u)` makes the results yours.
ENV HOME=/tmp PYTHONDONTWRITEBYTECODE=1
RUN useradd --uid 1000 --no-create-home --home-dir /tmp registration && install -d -o registration /data
USER registration
WORKDIR /data
VOLUME ["/data"]
ENTRYPOINT ["monai-register"]
CMD ["--help"]
