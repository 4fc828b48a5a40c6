/* A stand-in libnvidia-ml.so.1: the functions that r1hpc/telemetry/gpu/nvml.py calls, with NVML's struct
 * layouts and return codes, and readings that depend on nothing but how often they were asked for.
 *
 * It proves symbol names, layouts, error paths and reports. It proves nothing about real values, driver
 * locks, permissions or the time a real call takes; so it says so (driver "stub-...", r1hpc_nvml_stub).
 *
 * R1HPC_NVML_STUB holds settings "key=value", or "<gpu index>.key=value" for one GPU, separated by ';'
 * or newlines; "@FILE" reads them from a file. Read at nvmlInit. Keys:
 *   gpus=8            how many GPUs (at most 16)       init_error=CODE  what nvmlInit returns
 *   order=reversed    UUIDs run against the indices    slow=FUNCTION:MS one function sleeps this long
 * and for all GPUs or one of them:
 *   profile=busy|idle|hang     hang: 100 % utilisation at 70 W
 *   fail=FUNCTION:CODE[+...]   these functions return CODE (3 not supported, 4 no permission, ...)
 *   handle_error=CODE          the GPU cannot be opened
 *   lost_after=N               after N calls every call returns 15, GPU is lost
 *   energy_reset_at=N          the Nth energy reading starts again from 0
 *   processes=N                compute processes;   race=N: this many times they outgrow the buffer
 *   throttle=MASK  ecc_corrected=N  ecc_uncorrected=N  links=N  links_down=N
 *   mig=1                      no utilisation on the card; instance "MIG-" + the card's UUID without "GPU-"
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
       GPU_IS_LOST = 15, VERSION_MISMATCH = 25 };
enum { MAX_GPUS = 16, TEXT = 1024 };
#define GIB (1ULL << 30)
#define MEMORY_V2 0x02000028u
#define TEMPERATURE_V1 0x0100000Cu

typedef unsigned int u32;
typedef unsigned long long u64;

typedef struct { u32 gpu, memory; } Utilization;
typedef struct { u64 total, free, used; } Memory;
typedef struct { u32 version; u64 total, reserved, free, used; } MemoryV2;
typedef struct { u32 version, sensor; int celsius; } TemperatureV1;
typedef struct { u32 pid; u64 used; u32 gpu_instance, compute_instance; } Process;
typedef struct { char legacy[16]; u32 domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
typedef struct {
    u32 field, scope;
    long long timestamp, latency_us;
    u32 type, code;
    union { double d; u64 ull; } value;
} FieldValue;

_Static_assert(sizeof(MemoryV2) == (MEMORY_V2 & 0xffff), "nvmlMemory_v2_t");
_Static_assert(sizeof(TemperatureV1) == (TEMPERATURE_V1 & 0xffff), "nvmlTemperature_v1_t");
_Static_assert(sizeof(Process) == 24 && sizeof(Pci) == 68 && sizeof(FieldValue) == 40, "nvml.h");

typedef struct {
    int index, is_mig;
    char uuid[80], profile[16], fail[TEXT];
    long handle_error, lost_after, energy_reset_at, processes, race, throttle;
    long ecc_corrected, ecc_uncorrected, links, links_down, mig;
    long calls, utilization_calls, power_calls, energy_calls, clock_calls, link_calls;
} Gpu;

int r1hpc_nvml_stub = 1;

static Gpu gpus[MAX_GPUS], instances[MAX_GPUS];
static long num_gpus, init_error, users;
static int reversed;
static char slow[TEXT];

/* ---- settings ---- */

static void set_number(long *place, const char *key, const char *wanted, const char *value) {
    if (strcmp(key, wanted) == 0) *place = strtol(value, NULL, 0);
}

static void set_gpu(Gpu *gpu, const char *key, const char *value) {
    if (strcmp(key, "profile") == 0) snprintf(gpu->profile, sizeof gpu->profile, "%s", value);
    if (strcmp(key, "fail") == 0) snprintf(gpu->fail, sizeof gpu->fail, "+%s", value);
    set_number(&gpu->handle_error, key, "handle_error", value);
    set_number(&gpu->lost_after, key, "lost_after", value);
    set_number(&gpu->energy_reset_at, key, "energy_reset_at", value);
    set_number(&gpu->processes, key, "processes", value);
    set_number(&gpu->race, key, "race", value);
    set_number(&gpu->throttle, key, "throttle", value);
    set_number(&gpu->ecc_corrected, key, "ecc_corrected", value);
    set_number(&gpu->ecc_uncorrected, key, "ecc_uncorrected", value);
    set_number(&gpu->links, key, "links", value);
    set_number(&gpu->links_down, key, "links_down", value);
    set_number(&gpu->mig, key, "mig", value);
}

static void set(char *setting) {
    char *value = strchr(setting, '=');
    if (!value) return;
    *value++ = 0;
    char *dot = strchr(setting, '.');
    if (dot) {
        long index = strtol(setting, NULL, 10);
        if (index >= 0 && index < MAX_GPUS) set_gpu(&gpus[index], dot + 1, value);
        return;
    }
    set_number(&num_gpus, setting, "gpus", value);
    set_number(&init_error, setting, "init_error", value);
    if (strcmp(setting, "order") == 0) reversed = strcmp(value, "reversed") == 0;
    if (strcmp(setting, "slow") == 0) snprintf(slow, sizeof slow, "+%s", value);
    for (int i = 0; i < MAX_GPUS; i++) set_gpu(&gpus[i], setting, value);
}

static void read_settings(void) {
    static char text[64 * 1024];
    const char *wanted = getenv("R1HPC_NVML_STUB");
    if (!wanted) return;
    if (wanted[0] == '@') {
        FILE *file = fopen(wanted + 1, "r");
        if (!file) abort();
        text[fread(text, 1, sizeof text - 1, file)] = 0;
        fclose(file);
    } else {
        snprintf(text, sizeof text, "%s", wanted);
    }
    for (char *item = strtok(text, ";\n"); item; item = strtok(NULL, ";\n")) set(item);
}

static void start(void) {
    num_gpus = 8;
    for (int i = 0; i < MAX_GPUS; i++) {
        gpus[i] = (Gpu){.index = i, .profile = "busy", .lost_after = -1, .processes = 1, .links = 12};
        gpus[i].energy_reset_at = -1;
    }
    read_settings();
    if (num_gpus > MAX_GPUS) num_gpus = MAX_GPUS;
    for (int i = 0; i < num_gpus; i++) {
        int label = reversed ? (int)num_gpus - 1 - i : i;
        snprintf(gpus[i].uuid, sizeof gpus[i].uuid, "GPU-%08x-57ab-4000-8000-0000000000%02x", label + 0xa0, label);
        instances[i] = gpus[i];
        instances[i].is_mig = 1;
        memcpy(instances[i].uuid, "MIG", 3);
    }
}

/* ---- faults ---- */

/* The number after "FUNCTION:" in "+FUNCTION:NUMBER+...", or `otherwise`. */
static long setting_of(const char *list, const char *function, long otherwise) {
    size_t length = strlen(function);
    for (const char *at = list; (at = strchr(at, '+')) != NULL; at++)
        if (strncmp(at + 1, function, length) == 0 && at[1 + length] == ':') return strtol(at + length + 2, NULL, 0);
    return otherwise;
}

static int enter(Gpu *gpu, const char *function) {
    if (users == 0) return UNINITIALIZED;
    if (slow[0]) {
        long ms = setting_of(slow, function, 0);
        struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
        nanosleep(&pause, NULL);
    }
    if (gpu == NULL) return INVALID_ARGUMENT;
    gpu->calls++;
    if (gpu->lost_after >= 0 && gpu->calls > gpu->lost_after) return GPU_IS_LOST;
    return gpu->fail[0] ? (int)setting_of(gpu->fail, function, SUCCESS) : SUCCESS;
}

#define ENTER(gpu) do { int code = enter(gpu, __func__); if (code != SUCCESS) return code; } while (0)
/* As NVML: a MIG instance has memory and processes of its own, the rest belongs to the card. */
#define CARD_ONLY(gpu) do { if ((gpu)->is_mig) return INVALID_ARGUMENT; } while (0)

static int copy_text(char *to, u32 size, const char *from) {
    if (strlen(from) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return SUCCESS;
}

/* How many NVML calls named this GPU so far: for tests of what is not asked again. */
long r1hpc_nvml_stub_calls(int index) { return gpus[index].calls; }

/* ---- library and devices ---- */

int nvmlInitWithFlags(u32 flags) {
    (void)flags;
    if (users == 0) start();
    if (init_error) return (int)init_error;
    users++;
    return SUCCESS;
}

int nvmlShutdown(void) {
    if (users == 0) return UNINITIALIZED;
    users--;
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *version, u32 size) { return copy_text(version, size, "stub-550.54"); }

int nvmlDeviceGetCount_v2(u32 *count) {
    if (users == 0) return UNINITIALIZED;
    *count = (u32)num_gpus;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(u32 index, Gpu **device) {
    if (users == 0) return UNINITIALIZED;
    if (index >= (u32)num_gpus) return INVALID_ARGUMENT;
    *device = &gpus[index];
    return (int)gpus[index].handle_error;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Gpu **device) {
    for (int i = 0; i < num_gpus; i++) {
        *device = strncmp(uuid, "MIG", 3) == 0 ? &instances[i] : &gpus[i];
        if (strcmp(uuid, (*device)->uuid) == 0 && (!(*device)->is_mig || gpus[i].mig)) return SUCCESS;
    }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(Gpu *gpu, char *uuid, u32 size) { ENTER(gpu); return copy_text(uuid, size, gpu->uuid); }

int nvmlDeviceGetName(Gpu *gpu, char *name, u32 size) {
    ENTER(gpu);
    return copy_text(name, size, gpu->is_mig ? "Stub A100-SXM4-80GB MIG 1g.10gb" : "Stub A100-SXM4-80GB");
}

int nvmlDeviceGetIndex(Gpu *gpu, u32 *index) {
    ENTER(gpu);
    *index = gpu->is_mig ? 0 : (u32)gpu->index;
    return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(Gpu *gpu, Pci *pci) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    *pci = (Pci){.bus = (u32)gpu->index + 7, .id = 0x20b210deu};
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
    return SUCCESS;
}

/* ---- readings ---- */

int nvmlDeviceGetUtilizationRates(Gpu *gpu, Utilization *rates) {
    ENTER(gpu);
    if (gpu->is_mig || gpu->mig) return NOT_SUPPORTED;
    u32 n = (u32)(gpu->utilization_calls++ + gpu->index);
    *rates = (Utilization){90 + n % 10, 40 + n % 5};
    if (strcmp(gpu->profile, "hang") == 0) *rates = (Utilization){100, 0};
    if (strcmp(gpu->profile, "idle") == 0) *rates = (Utilization){0, 0};
    return SUCCESS;
}

static u64 total_of(const Gpu *gpu) { return (gpu->is_mig ? 10 : 80) * GIB; }
static u64 used_of(const Gpu *gpu) { return gpu->is_mig ? 3 * GIB : (20 + (u64)gpu->index) * GIB; }

int nvmlDeviceGetMemoryInfo(Gpu *gpu, Memory *memory) {
    ENTER(gpu);
    u64 used = used_of(gpu) + GIB / 2; /* version 1 counts what the driver reserves as used */
    *memory = (Memory){total_of(gpu), total_of(gpu) - used, used};
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(Gpu *gpu, MemoryV2 *memory) {
    ENTER(gpu);
    if (memory->version != MEMORY_V2) return VERSION_MISMATCH;
    u64 free = total_of(gpu) - GIB / 2 - used_of(gpu);
    *memory = (MemoryV2){MEMORY_V2, total_of(gpu), GIB / 2, free, used_of(gpu)};
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(Gpu *gpu, u32 *milliwatt) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    *milliwatt = 300000 + 1000 * (u32)((gpu->power_calls++ * 7 + gpu->index) % 50);
    if (strcmp(gpu->profile, "hang") == 0) *milliwatt = 70000;
    if (strcmp(gpu->profile, "idle") == 0) *milliwatt = 55000;
    return SUCCESS;
}

int nvmlDeviceGetEnforcedPowerLimit(Gpu *gpu, u32 *milliwatt) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    *milliwatt = 400000;
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(Gpu *gpu, u64 *millijoule) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    long n = gpu->energy_calls++, reset = gpu->energy_reset_at;
    u64 before = 1000000000ULL * (u64)(gpu->index + 1);
    *millijoule = reset >= 0 && n >= reset ? 300000ULL * (u64)(n - reset) : before + 300000ULL * (u64)n;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(Gpu *gpu, u32 sensor, u32 *celsius) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    if (sensor != 0) return INVALID_ARGUMENT;
    *celsius = 60 + (u32)gpu->index;
    return SUCCESS;
}

int nvmlDeviceGetTemperatureV(Gpu *gpu, TemperatureV1 *temperature) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    if (temperature->version != TEMPERATURE_V1) return VERSION_MISMATCH;
    temperature->celsius = 60 + gpu->index;
    return SUCCESS;
}

int nvmlDeviceGetClockInfo(Gpu *gpu, u32 clock, u32 *mhz) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    if (clock > 3) return INVALID_ARGUMENT;
    *mhz = clock == 2 ? 1593 : 1410 - 15 * (u32)(gpu->clock_calls++ % 2);
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(Gpu *gpu, u64 *mask) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    *mask = (u64)gpu->throttle;
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(Gpu *gpu, u64 *mask) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    *mask = (u64)gpu->throttle;
    return SUCCESS;
}

int nvmlDeviceGetTotalEccErrors(Gpu *gpu, u32 error, u32 counter, u64 *count) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    if (error > 1 || counter > 1) return INVALID_ARGUMENT;
    *count = counter == 1 ? 999 : (u64)(error ? gpu->ecc_uncorrected : gpu->ecc_corrected);
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *gpu, u32 *count, Process *processes) {
    ENTER(gpu);
    if (gpu->race > 0) {
        gpu->race--;
        gpu->processes = *count + 10;
    }
    u32 room = *count;
    *count = (u32)gpu->processes;
    if (gpu->processes == 0) return SUCCESS;
    if (room < (u32)gpu->processes || processes == NULL) return INSUFFICIENT_SIZE;
    for (u32 i = 0; i < *count; i++) {
        u64 used = i == 1 ? ~0ULL : 2 * GIB; /* the second one: memory not available */
        processes[i] = (Process){1000 * (u32)(gpu->index + 1) + i, used, ~0u, ~0u};
    }
    return SUCCESS;
}

int nvmlDeviceGetPcieThroughput(Gpu *gpu, u32 counter, u32 *rate) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    if (counter > 1) return INVALID_ARGUMENT;
    *rate = (counter ? 2000 : 1000) + (u32)gpu->index;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkState(Gpu *gpu, u32 link, u32 *active) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    if (gpu->links == 0) return NOT_SUPPORTED;
    if (link >= (u32)gpu->links) return INVALID_ARGUMENT;
    *active = link >= (u32)gpu->links_down;
    return SUCCESS;
}

int nvmlDeviceGetFieldValues(Gpu *gpu, int count, FieldValue *values) {
    ENTER(gpu);
    CARD_ONLY(gpu);
    for (int i = 0; i < count; i++) {
        int known = gpu->links > 0 && values[i].scope == ~0u && (values[i].field == 138 || values[i].field == 139);
        values[i].code = known ? SUCCESS : NOT_SUPPORTED;
        if (!known) continue;
        values[i].type = 3;
        values[i].value.ull = 5000000000ULL + 100 * (u64)gpu->link_calls++ + (values[i].field == 139);
    }
    return SUCCESS;
}
