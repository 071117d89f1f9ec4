// A program around a network, for Linux on aarch64, that needs no C library: it reads a byte, 0 for codes and 1 for
// floats, and 2 more for each shorter length, and all inputs of that kind; it writes when the run began and ended
// (seconds and nanoseconds of the monotonic clock, 8 bytes each) and all outputs; and so on, until its input ends.
.text
.globl _start
.type _start, %function
.type take, %function
.type give, %function
.type clock, %function
.type leave, %function
.type memcpy, %function
.type memmove, %function
.type memset, %function
_start:
adrp x1, kind
add x1, x1, :lo12:kind
mov x2, #1
bl take
adrp x9, kind
ldrb w9, [x9, :lo12:kind]
adrp x20, kinds
add x20, x20, :lo12:kinds
add x20, x20, x9, lsl #5
adrp x1, input
add x1, x1, :lo12:input
ldr x2, [x20]
bl take
adrp x21, times
add x21, x21, :lo12:times
mov x1, x21
bl clock
adrp x0, workspace
add x0, x0, :lo12:workspace
adrp x1, input
add x1, x1, :lo12:input
adrp x2, output
add x2, x2, :lo12:output
ldr x9, [x20, #16]
blr x9
add x1, x21, #16
bl clock
mov x1, x21
mov x2, #32
bl give
adrp x1, output
add x1, x1, :lo12:output
ldr x2, [x20, #8]
bl give
b _start

// Read x2 bytes to x1; leave where there are no more.
take:
mov x0, #0
mov x8, #63
svc #0
cmp x0, #0
b.le leave
add x1, x1, x0
subs x2, x2, x0
b.ne take
ret

// Write x2 bytes from x1.
give:
mov x0, #1
mov x8, #64
svc #0
cmp x0, #0
b.le leave
add x1, x1, x0
subs x2, x2, x0
b.ne give
ret

// Write the monotonic clock's time to x1.
clock:
mov x0, #1
mov x8, #113
svc #0
ret

leave:
mov x0, #0
mov x8, #93
svc #0

// What LLVM asks of a C library.
.globl memcpy
memcpy:
mov x9, x0
1: cmp x2, #16
b.lo 2f
ldr q0, [x1], #16
str q0, [x9], #16
sub x2, x2, #16
b 1b
2: cbz x2, 3f
ldrb w10, [x1], #1
strb w10, [x9], #1
sub x2, x2, #1
b 2b
3: ret

.globl memmove
memmove:
cmp x0, x1
b.ls memcpy
1: cbz x2, 2f
sub x2, x2, #1
ldrb w10, [x1, x2]
strb w10, [x0, x2]
b 1b
2: ret

.globl memset
memset:
mov x9, x0
dup v0.16b, w1
1: cmp x2, #16
b.lo 2f
str q0, [x9], #16
sub x2, x2, #16
b 1b
2: cbz x2, 3f
strb w1, [x9], #1
sub x2, x2, #1
b 2b
3: ret

.data
.balign 8
// By kind: bytes of all inputs, of all outputs, and what runs it.
kinds:
$kinds

.bss
.balign 64
kind: .zero 64
times: .zero 64
input: .zero $most_in
.balign 64
output: .zero $most_out
.balign 64
workspace: .zero $workspace
