"""Other programs that register: thin classes by which they call our bundles.

`nipype_interface` needs nipype, `physiotwin` needs physiotwin4d; nothing else here does.
May import: `common.run`, `common.quality`, `common.space`, the science, `common.ops`; each host in its own file only.
"""
