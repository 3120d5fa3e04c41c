"""Between decode and transport: frame interpolation (RIFE), then upscaling (Real-ESRGAN).

loader.py       weight files -> networks; the architecture follows from the weights
interpolate.py  IFNet: the frames between two frames
upscale.py      SRVGGNetCompact and RRDBNet: larger frames
stage.py        PostProcessor: one per session, frames in, frames out
"""
