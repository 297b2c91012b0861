"""A static model of a kernel: what its compiled code and the geometry say of its time, with no device."""
