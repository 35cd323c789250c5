"""What is inside a checkpoint, and whether it is any good.

What affects numbers that describe a checkpoint lives here.  Nothing in this wing knows what a checkpoint can become.

===========  ==========================================================================
`survey`     what is in a block of floats, compiled or with numpy
`small`      the same for many small tensors at once
`values`     the pass over all tensors, block by block; NaN and infinities refused
`summary`    what there is to know
`models`     which base model a shape belongs to
`verdict`    whether a training is sound
`summarise`  all of it put together
`made`       models and folders that this project wrote, of which there is less to say
`plot`       pictures of it
===========  ==========================================================================
"""
