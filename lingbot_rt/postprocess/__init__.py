"""What happens to pixels between decode and transport: frames in between (RIFE), then larger frames (Real-ESRGAN).

plan.py         what a session asked for, host data only: frame counts, sizes, paths (never imports torch)
loader.py       weight files -> networks; the architecture is read off the weights
interpolate.py  IFNet: the frames between two frames
upscale.py      SRVGGNetCompact and RRDBNet: larger frames
stage.py        PostProcessor: one a session, frames in, frames out
"""
