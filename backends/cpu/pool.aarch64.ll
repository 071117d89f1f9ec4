; ModuleID = 'pool.c'
source_filename = "pool.c"
target datalayout = "e-m:e-i8:8:32-i16:16:32-i64:64-i128:128-n32:64-S128-Fn32"
target triple = "aarch64-unknown-linux-gnu"

%struct.worker = type { [64 x i8], i64, ptr, i32, i32, [40 x i8] }

@qc_steps = external local_unnamed_addr constant i32, align 4
@qc_shared = external local_unnamed_addr constant [0 x i8], align 1

; Function Attrs: nounwind
define void @qc_wake(ptr noundef %0) local_unnamed_addr #0 {
  %2 = load i32, ptr %0, align 64, !tbaa !3
  %3 = icmp sgt i32 %2, 1
  br i1 %3, label %4, label %23

4:                                                ; preds = %1
  %5 = getelementptr inbounds i8, ptr %0, i64 64
  %6 = load atomic i64, ptr %5 monotonic, align 64
  %7 = add i64 %6, 1
  store atomic i64 %7, ptr %5 seq_cst, align 64
  %8 = getelementptr inbounds i8, ptr %0, i64 256
  br label %9

9:                                                ; preds = %17, %4
  %10 = phi i64 [ 0, %4 ], [ %18, %17 ]
  %11 = getelementptr inbounds [15 x %struct.worker], ptr %8, i64 0, i64 %10
  %12 = getelementptr inbounds i8, ptr %11, i64 84
  %13 = atomicrmw xchg ptr %12, i32 0 seq_cst, align 4
  %14 = icmp eq i32 %13, 0
  br i1 %14, label %17, label %15

15:                                               ; preds = %9
  %16 = tail call i32 @sem_post(ptr noundef nonnull %11) #4
  br label %17

17:                                               ; preds = %15, %9
  %18 = add nuw nsw i64 %10, 1
  %19 = load i32, ptr %0, align 64, !tbaa !3
  %20 = add nsw i32 %19, -1
  %21 = sext i32 %20 to i64
  %22 = icmp slt i64 %18, %21
  br i1 %22, label %9, label %23, !llvm.loop !9

23:                                               ; preds = %17, %1
  ret void
}

; Function Attrs: nounwind
define void @qc_compute(ptr noundef %0) local_unnamed_addr #0 {
  %2 = load i32, ptr %0, align 64, !tbaa !3
  %3 = icmp slt i32 %2, 2
  br i1 %3, label %4, label %11

4:                                                ; preds = %1
  %5 = load i32, ptr @qc_steps, align 4, !tbaa !11
  %6 = icmp sgt i32 %5, 0
  br i1 %6, label %7, label %19

7:                                                ; preds = %4, %7
  %8 = phi i32 [ %9, %7 ], [ 0, %4 ]
  tail call void @qc_step(ptr noundef nonnull %0, i32 noundef %8, i32 noundef 0, i32 noundef 1) #4
  %9 = add nuw nsw i32 %8, 1
  %10 = icmp eq i32 %9, %5
  br i1 %10, label %19, label %7, !llvm.loop !12

11:                                               ; preds = %1
  %12 = getelementptr inbounds i8, ptr %0, i64 128
  %13 = load atomic i64, ptr %12 monotonic, align 64
  %14 = lshr i64 %13, 16
  %15 = and i64 %13, -65536
  store atomic i64 %15, ptr %12 release, align 64
  %16 = load i32, ptr @qc_steps, align 4, !tbaa !11
  %17 = sext i32 %16 to i64
  %18 = add nsw i64 %14, %17
  tail call fastcc void @help(ptr noundef nonnull %0, i32 noundef 0, i64 noundef %18) #5
  br label %19

19:                                               ; preds = %7, %4, %11
  ret void
}

declare void @qc_step(ptr noundef, i32 noundef, i32 noundef, i32 noundef) local_unnamed_addr #1

; Function Attrs: nounwind
define internal fastcc void @help(ptr noundef %0, i32 noundef %1, i64 noundef %2) unnamed_addr #0 {
  %4 = getelementptr inbounds i8, ptr %0, i64 128
  %5 = load atomic i64, ptr %4 acquire, align 64
  %6 = lshr i64 %5, 16
  %7 = icmp ult i64 %6, %2
  br i1 %7, label %8, label %65

8:                                                ; preds = %3
  %9 = load i32, ptr @qc_steps, align 4, !tbaa !11
  %10 = sext i32 %9 to i64
  %11 = shl nuw i32 1, %1
  %12 = getelementptr inbounds i8, ptr %0, i64 192
  br label %13

13:                                               ; preds = %8, %60
  %14 = phi i64 [ %6, %8 ], [ %63, %60 ]
  %15 = phi i64 [ %5, %8 ], [ %62, %60 ]
  %16 = phi i32 [ 0, %8 ], [ %61, %60 ]
  %17 = urem i64 %14, %10
  %18 = trunc i64 %17 to i32
  %19 = shl i64 %17, 32
  %20 = ashr exact i64 %19, 32
  %21 = getelementptr inbounds [0 x i8], ptr @qc_shared, i64 0, i64 %20
  %22 = load i8, ptr %21, align 1, !tbaa !13
  %23 = icmp eq i8 %22, 0
  br i1 %23, label %26, label %24

24:                                               ; preds = %13
  %25 = load i32, ptr %0, align 64, !tbaa !3
  br label %26

26:                                               ; preds = %13, %24
  %27 = phi i32 [ %25, %24 ], [ 1, %13 ]
  %28 = trunc i64 %15 to i32
  %29 = shl nsw i32 -1, %27
  %30 = or i32 %29, %28
  %31 = icmp eq i32 %30, -1
  br i1 %31, label %32, label %38

32:                                               ; preds = %26
  %33 = add i32 %16, 1
  %34 = icmp ugt i32 %16, 999
  br i1 %34, label %35, label %37

35:                                               ; preds = %32
  %36 = tail call i32 @sched_yield() #4
  br label %60

37:                                               ; preds = %32
  tail call void asm sideeffect "yield", ""() #6, !srcloc !14
  br label %60

38:                                               ; preds = %26
  %39 = xor i32 %30, -1
  %40 = and i32 %30, %11
  %41 = icmp eq i32 %40, 0
  %42 = tail call range(i32 0, 33) i32 @llvm.cttz.i32(i32 %39, i1 false)
  %43 = select i1 %41, i32 %1, i32 %42
  %44 = shl nuw i32 1, %43
  %45 = zext i32 %44 to i64
  %46 = or i64 %15, %45
  %47 = cmpxchg ptr %4, i64 %15, i64 %46 acquire monotonic, align 64
  %48 = extractvalue { i64, i1 } %47, 1
  br i1 %48, label %49, label %60

49:                                               ; preds = %38
  tail call void @qc_step(ptr noundef nonnull %0, i32 noundef %18, i32 noundef %43, i32 noundef %27) #4
  %50 = atomicrmw add ptr %12, i32 1 acq_rel, align 64
  %51 = add i32 %50, 1
  %52 = icmp eq i32 %51, %27
  br i1 %52, label %53, label %60

53:                                               ; preds = %49
  store atomic i32 0, ptr %12 monotonic, align 64
  %54 = and i64 %15, -65536
  %55 = add i64 %54, 65536
  %56 = add nsw i32 %18, 1
  %57 = icmp eq i32 %56, %9
  %58 = select i1 %57, i64 65535, i64 0
  %59 = or disjoint i64 %58, %55
  store atomic i64 %59, ptr %4 release, align 64
  br label %60

60:                                               ; preds = %37, %35, %49, %53, %38
  %61 = phi i32 [ %16, %38 ], [ 0, %53 ], [ 0, %49 ], [ %33, %35 ], [ %33, %37 ]
  %62 = load atomic i64, ptr %4 acquire, align 64
  %63 = lshr i64 %62, 16
  %64 = icmp ult i64 %63, %2
  br i1 %64, label %13, label %65

65:                                               ; preds = %60, %3
  ret void
}

; Function Attrs: nounwind
define void @qc_stop(ptr noundef %0) local_unnamed_addr #0 {
  %2 = getelementptr inbounds i8, ptr %0, i64 64
  store atomic i64 -1, ptr %2 seq_cst, align 64
  %3 = load i32, ptr %0, align 64, !tbaa !3
  %4 = icmp sgt i32 %3, 1
  br i1 %4, label %5, label %25

5:                                                ; preds = %1
  %6 = getelementptr inbounds i8, ptr %0, i64 256
  br label %7

7:                                                ; preds = %15, %5
  %8 = phi i64 [ 0, %5 ], [ %16, %15 ]
  %9 = getelementptr inbounds [15 x %struct.worker], ptr %6, i64 0, i64 %8
  %10 = getelementptr inbounds i8, ptr %9, i64 84
  %11 = atomicrmw xchg ptr %10, i32 0 seq_cst, align 4
  %12 = icmp eq i32 %11, 0
  br i1 %12, label %15, label %13

13:                                               ; preds = %7
  %14 = tail call i32 @sem_post(ptr noundef nonnull %9) #4
  br label %15

15:                                               ; preds = %13, %7
  %16 = add nuw nsw i64 %8, 1
  %17 = load i32, ptr %0, align 64, !tbaa !3
  %18 = add nsw i32 %17, -1
  %19 = sext i32 %18 to i64
  %20 = icmp slt i64 %16, %19
  br i1 %20, label %7, label %21, !llvm.loop !9

21:                                               ; preds = %15
  %22 = icmp sgt i32 %17, 1
  br i1 %22, label %23, label %25

23:                                               ; preds = %21
  %24 = getelementptr inbounds i8, ptr %0, i64 256
  br label %26

25:                                               ; preds = %26, %1, %21
  store i32 0, ptr %0, align 64, !tbaa !3
  ret void

26:                                               ; preds = %23, %26
  %27 = phi i64 [ 0, %23 ], [ %33, %26 ]
  %28 = getelementptr inbounds [15 x %struct.worker], ptr %24, i64 0, i64 %27
  %29 = getelementptr inbounds i8, ptr %28, i64 64
  %30 = load i64, ptr %29, align 64, !tbaa !15
  %31 = tail call i32 @pthread_join(i64 noundef %30, ptr noundef null) #4
  %32 = tail call i32 @sem_destroy(ptr noundef nonnull %28) #4
  %33 = add nuw nsw i64 %27, 1
  %34 = load i32, ptr %0, align 64, !tbaa !3
  %35 = add nsw i32 %34, -1
  %36 = sext i32 %35 to i64
  %37 = icmp slt i64 %33, %36
  br i1 %37, label %26, label %25, !llvm.loop !18
}

declare extern_weak i32 @pthread_join(i64 noundef, ptr noundef) #1

declare extern_weak i32 @sem_destroy(ptr noundef) #1

; Function Attrs: nounwind
define i32 @qc_start(ptr noundef %0, i32 noundef %1) local_unnamed_addr #0 {
  tail call void @llvm.memset.p0.i64(ptr noundef nonnull align 64 dereferenceable(128) %0, i8 0, i64 128, i1 false)
  %3 = getelementptr inbounds i8, ptr %0, i64 128
  store i64 65535, ptr %3, align 64, !tbaa !19
  %4 = getelementptr inbounds i8, ptr %0, i64 136
  tail call void @llvm.memset.p0.i64(ptr noundef nonnull align 8 dereferenceable(2040) %4, i8 0, i64 2040, i1 false)
  %5 = add i32 %1, -17
  %6 = icmp ult i32 %5, -16
  br i1 %6, label %79, label %7

7:                                                ; preds = %2
  %8 = icmp ugt i32 %1, 1
  br i1 %8, label %9, label %23

9:                                                ; preds = %7
  %10 = icmp ne ptr @pthread_create, null
  %11 = icmp ne ptr @pthread_join, null
  %12 = and i1 %10, %11
  %13 = icmp ne ptr @sched_yield, null
  %14 = and i1 %13, %12
  %15 = icmp ne ptr @sem_init, null
  %16 = and i1 %15, %14
  %17 = icmp ne ptr @sem_wait, null
  %18 = and i1 %17, %16
  %19 = icmp ne ptr @sem_post, null
  %20 = and i1 %19, %18
  %21 = icmp ne ptr @sem_destroy, null
  %22 = and i1 %21, %20
  br i1 %22, label %23, label %79

23:                                               ; preds = %9, %7
  %24 = getelementptr inbounds i8, ptr %0, i64 256
  %25 = add nsw i32 %1, -1
  %26 = zext nneg i32 %25 to i64
  br label %27

27:                                               ; preds = %38, %23
  %28 = phi i64 [ %33, %38 ], [ 0, %23 ]
  %29 = icmp eq i64 %28, %26
  br i1 %29, label %76, label %30

30:                                               ; preds = %27
  %31 = getelementptr inbounds [15 x %struct.worker], ptr %24, i64 0, i64 %28
  %32 = getelementptr inbounds i8, ptr %31, i64 72
  store ptr %0, ptr %32, align 8, !tbaa !20
  %33 = add nuw nsw i64 %28, 1
  %34 = getelementptr inbounds i8, ptr %31, i64 80
  %35 = trunc nuw i64 %33 to i32
  store i32 %35, ptr %34, align 16, !tbaa !21
  %36 = tail call i32 @sem_init(ptr noundef nonnull %31, i32 noundef 0, i32 noundef 0) #4
  %37 = icmp eq i32 %36, 0
  br i1 %37, label %38, label %44

38:                                               ; preds = %30
  %39 = getelementptr inbounds i8, ptr %31, i64 64
  %40 = tail call i32 @pthread_create(ptr noundef nonnull %39, ptr noundef null, ptr noundef nonnull @work, ptr noundef nonnull %31) #4
  %41 = icmp eq i32 %40, 0
  br i1 %41, label %27, label %42

42:                                               ; preds = %38
  %43 = tail call i32 @sem_destroy(ptr noundef nonnull %31) #4
  br label %44

44:                                               ; preds = %30, %42
  %45 = phi i32 [ %40, %42 ], [ 38, %30 ]
  store i32 %35, ptr %0, align 64, !tbaa !3
  %46 = getelementptr inbounds i8, ptr %0, i64 64
  store atomic i64 -1, ptr %46 seq_cst, align 64
  %47 = icmp sgt i32 %35, 1
  br i1 %47, label %48, label %76

48:                                               ; preds = %44, %56
  %49 = phi i64 [ %57, %56 ], [ 0, %44 ]
  %50 = getelementptr inbounds [15 x %struct.worker], ptr %24, i64 0, i64 %49
  %51 = getelementptr inbounds i8, ptr %50, i64 84
  %52 = atomicrmw xchg ptr %51, i32 0 seq_cst, align 4
  %53 = icmp eq i32 %52, 0
  br i1 %53, label %56, label %54

54:                                               ; preds = %48
  %55 = tail call i32 @sem_post(ptr noundef nonnull %50) #4
  br label %56

56:                                               ; preds = %54, %48
  %57 = add nuw nsw i64 %49, 1
  %58 = load i32, ptr %0, align 64, !tbaa !3
  %59 = add nsw i32 %58, -1
  %60 = sext i32 %59 to i64
  %61 = icmp slt i64 %57, %60
  br i1 %61, label %48, label %62, !llvm.loop !9

62:                                               ; preds = %56
  %63 = icmp sgt i32 %58, 1
  br i1 %63, label %64, label %76

64:                                               ; preds = %62, %64
  %65 = phi i64 [ %71, %64 ], [ 0, %62 ]
  %66 = getelementptr inbounds [15 x %struct.worker], ptr %24, i64 0, i64 %65
  %67 = getelementptr inbounds i8, ptr %66, i64 64
  %68 = load i64, ptr %67, align 64, !tbaa !15
  %69 = tail call i32 @pthread_join(i64 noundef %68, ptr noundef null) #4
  %70 = tail call i32 @sem_destroy(ptr noundef nonnull %66) #4
  %71 = add nuw nsw i64 %65, 1
  %72 = load i32, ptr %0, align 64, !tbaa !3
  %73 = add nsw i32 %72, -1
  %74 = sext i32 %73 to i64
  %75 = icmp slt i64 %71, %74
  br i1 %75, label %64, label %76, !llvm.loop !18

76:                                               ; preds = %27, %64, %62, %44
  %77 = phi i32 [ 0, %44 ], [ 0, %62 ], [ 0, %64 ], [ %1, %27 ]
  %78 = phi i32 [ %45, %44 ], [ %45, %62 ], [ %45, %64 ], [ 0, %27 ]
  store i32 %77, ptr %0, align 64, !tbaa !3
  br label %79

79:                                               ; preds = %76, %9, %2
  %80 = phi i32 [ 22, %2 ], [ 38, %9 ], [ %78, %76 ]
  ret i32 %80
}

; Function Attrs: mustprogress nocallback nofree nounwind willreturn memory(argmem: write)
declare void @llvm.memset.p0.i64(ptr nocapture writeonly, i8, i64, i1 immarg) #2

declare extern_weak i32 @pthread_create(ptr noundef, ptr noundef, ptr noundef, ptr noundef) #1

declare extern_weak i32 @sched_yield() #1

declare extern_weak i32 @sem_init(ptr noundef, i32 noundef, i32 noundef) #1

declare extern_weak i32 @sem_wait(ptr noundef) #1

declare extern_weak i32 @sem_post(ptr noundef) #1

; Function Attrs: nounwind
define internal noundef ptr @work(ptr noundef %0) #0 {
  %2 = getelementptr inbounds i8, ptr %0, i64 72
  %3 = load ptr, ptr %2, align 8, !tbaa !20
  %4 = getelementptr inbounds i8, ptr %0, i64 84
  %5 = getelementptr inbounds i8, ptr %0, i64 80
  %6 = load i32, ptr @qc_steps, align 4
  %7 = sext i32 %6 to i64
  br label %8

8:                                                ; preds = %35, %1
  %9 = phi ptr [ %3, %1 ], [ %38, %35 ]
  %10 = phi i64 [ 0, %1 ], [ %32, %35 ]
  %11 = getelementptr inbounds i8, ptr %9, i64 64
  br label %12

12:                                               ; preds = %16, %8
  %13 = phi i32 [ 0, %8 ], [ %17, %16 ]
  %14 = load atomic i64, ptr %11 acquire, align 8
  %15 = icmp eq i64 %14, %10
  br i1 %15, label %16, label %31

16:                                               ; preds = %12
  tail call void asm sideeffect "yield", ""() #6, !srcloc !14
  %17 = add nuw nsw i32 %13, 1
  %18 = icmp eq i32 %17, 1000
  br i1 %18, label %19, label %12, !llvm.loop !22

19:                                               ; preds = %16
  store atomic i32 1, ptr %4 seq_cst, align 4
  %20 = load atomic i64, ptr %11 seq_cst, align 8
  %21 = icmp eq i64 %20, %10
  br i1 %21, label %25, label %22

22:                                               ; preds = %19
  %23 = atomicrmw xchg ptr %4, i32 0 seq_cst, align 4
  %24 = icmp eq i32 %23, 0
  br i1 %24, label %25, label %29

25:                                               ; preds = %22, %19
  br label %26

26:                                               ; preds = %25, %26
  %27 = tail call i32 @sem_wait(ptr noundef %0) #4
  %28 = icmp eq i32 %27, 0
  br i1 %28, label %29, label %26, !llvm.loop !23

29:                                               ; preds = %26, %22
  %30 = load atomic i64, ptr %11 acquire, align 8
  br label %31

31:                                               ; preds = %12, %29
  %32 = phi i64 [ %30, %29 ], [ %14, %12 ]
  %33 = icmp eq i64 %32, -1
  br i1 %33, label %34, label %35

34:                                               ; preds = %31
  ret ptr null

35:                                               ; preds = %31
  %36 = load i32, ptr %5, align 16, !tbaa !21
  %37 = mul i64 %32, %7
  tail call fastcc void @help(ptr noundef %3, i32 noundef %36, i64 noundef %37) #5
  %38 = load ptr, ptr %2, align 8, !tbaa !20
  br label %8
}

; Function Attrs: mustprogress nocallback nofree nosync nounwind speculatable willreturn memory(none)
declare i32 @llvm.cttz.i32(i32, i1 immarg) #3

attributes #0 = { nounwind "frame-pointer"="non-leaf" "no-builtins" "no-trapping-math"="true" "stack-protector-buffer-size"="8" "target-cpu"="generic" "target-features"="+fp-armv8,+neon,+reserve-x18,+v8a,-fmv,-outline-atomics" }
attributes #1 = { "frame-pointer"="non-leaf" "no-builtins" "no-trapping-math"="true" "stack-protector-buffer-size"="8" "target-cpu"="generic" "target-features"="+fp-armv8,+neon,+reserve-x18,+v8a,-fmv,-outline-atomics" }
attributes #2 = { mustprogress nocallback nofree nounwind willreturn memory(argmem: write) }
attributes #3 = { mustprogress nocallback nofree nosync nounwind speculatable willreturn memory(none) }
attributes #4 = { nobuiltin nounwind "no-builtins" }
attributes #5 = { nobuiltin "no-builtins" }
attributes #6 = { nounwind }

!llvm.module.flags = !{!0, !1, !2}

!0 = !{i32 1, !"wchar_size", i32 4}
!1 = !{i32 8, !"PIC Level", i32 2}
!2 = !{i32 7, !"frame-pointer", i32 1}
!3 = !{!4, !5, i64 0}
!4 = !{!"pool", !5, i64 0, !6, i64 4, !8, i64 64, !8, i64 128, !5, i64 192, !6, i64 256}
!5 = !{!"int", !6, i64 0}
!6 = !{!"omnipotent char", !7, i64 0}
!7 = !{!"Simple C/C++ TBAA"}
!8 = !{!"long", !6, i64 0}
!9 = distinct !{!9, !10}
!10 = !{!"llvm.loop.mustprogress"}
!11 = !{!5, !5, i64 0}
!12 = distinct !{!12, !10}
!13 = !{!6, !6, i64 0}
!14 = !{i64 2568}
!15 = !{!16, !8, i64 64}
!16 = !{!"worker", !6, i64 0, !8, i64 64, !17, i64 72, !5, i64 80, !5, i64 84}
!17 = !{!"any pointer", !6, i64 0}
!18 = distinct !{!18, !10}
!19 = !{!8, !8, i64 0}
!20 = !{!16, !17, i64 72}
!21 = !{!16, !5, i64 80}
!22 = distinct !{!22, !10}
!23 = distinct !{!23, !10}
