"""A static model of a kernel: what its compiled code and the geometry say of its time, with no device.

`ptx` follows addresses, `accesses` says what they cost, `sass` reads loops from machine code, `trips` counts how often
they run, `demand` adds up what a launch asks for, `machine` says how long a device takes for it, and `rows` puts the
prediction beside floor, goal and measurement.
"""
