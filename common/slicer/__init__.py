"""3-D Slicer: a scripted module that registers two volumes of the scene.

`MonaiRegister/` is the folder that Slicer is told of. Its `MonaiRegisterLib/job.py` runs `common register` as a
process, and is plain Python; `MonaiRegister.py` has what is seen.
May import: nothing of `common`, which Slicer's Python may not have.
"""
