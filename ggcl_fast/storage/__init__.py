"""Where bytes come from and where they go.

What affects paths, URLs, reading, and outputs that appear whole or not at all, lives here.  Nothing in this wing knows
what the bytes mean.

===========  =========================================================================================
`urls`       what is a URL, what may be shown of it, what may be made of a name below a folder
`identity`   which names are one file, and that no job takes the place of what another one has
`sources`    bytes of a file or of memory
`streams`    pipes and devices
`opening`    a source by its name
`joined`     several sources as one
`stores`     object stores, through fsspec
`remote`     sources in them
`system`     what the system offers beyond Python's ``os``
`outputs`    several outputs that appear together or not at all
`parts`      a locked temporary place beside a target
`holding`    whose is what, when several replace the same
`places`     how it takes the target's place
`files`      files and folders as outputs
`uploads`    objects as outputs
`creating`   outputs by their names
`copying`    bytes from a source to an output, as fast as the system copies
===========  =========================================================================================
"""
